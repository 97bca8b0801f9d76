import assert from "node:assert/strict";
import { test } from "node:test";
import { launch } from "../src/process.ts";
import { question } from "../src/questions.ts";
import { isSecretName } from "../src/secrets.ts";
import { textAround } from "../src/window.ts";

const node = (script: string): string[] => [process.execPath, "-e", script];

test("files that hold credentials are recognized by name, and source code is not among them", () => {
  for (const path of ["/p/.env", "/p/.env.local", "C:\\p\\server.key", "/p/cert.PEM", "/home/a/.ssh/config", "id_ed25519", "/p/secrets.yaml", "/p/.netrc",
    "/p/.git-credentials", "/p/prod.tfstate", "/p/kubeconfig", "/p/credentials", "/p/secrets.sh",
    "/p/credentials.json", "/p/prod.env", "/p/prod.env.local", "/p/terraform.tfvars", "/p/service_account.json", "/p/secrets.properties", "/p/a.gpg",
    "/p/.envrc", "/p/.aws/config", "/p/.gnupg/gpg.conf", "/p/example.key", "/p/api.example.com.env",
    "/p/.env~", "/p/#.env#", "/p/.env.swp", "/p/.id_rsa.swp", "/p/id_rsa.~2~", "/p/known_hosts.old", "/p/id_rsa_work", "deploy_rsa",
    "/p/.docker/config.json", "/p/.config/gh/hosts.yml", "/p/passwords.txt", "/p/token.json", "/p/kubeconfig.yaml", "/p/.secrets.toml"])
    assert.ok(isSecretName(path), path);
  for (const path of ["/p/environment.py", "/p/keys.py", "/p/.env_reader/a.py", "/p/monkey.ts", "/p/secrets.py", "/p/credentials.go", "secret.TS",
    "/p/credentials.proto", "/p/.env.d.ts", "/p/.env.example", "/p/secrets.example.yaml", "/p/id_rsa.go",
    "/p/tokenizer.json", "/p/password.py", "/p/token.ts", "/p/secrets.py~", "/p/.env.example~", "/p/.docker/nginx.conf", "/p/config.json", ""])
    assert.ok(!isSecretName(path), path);
  assert.ok(!isSecretName("/p/translation.key", "java") && isSecretName("/p/translation.key", "plaintext"));
  assert.ok(isSecretName("/p/server.pem", "java") && isSecretName("/p/.env", "python") && isSecretName("/p/credentials.json", "python"));
});

test("the start of the text moves in steps while the user types, and nothing next to the cursor is lost", () => {
  const text = Array.from({ length: 20_000 }, (_, line) => `line ${line}\n`).join("");
  const starts = new Set<number>();
  for (let offset = 100_000; offset < 110_000; offset += 100) {
    const { prefix, suffix } = textAround(text, offset);
    assert.ok(text.slice(0, offset).endsWith(prefix) && text.slice(offset).startsWith(suffix));
    assert.ok(prefix.length > 30_000 && prefix.length <= 48_000 && suffix.length === 16_000);
    starts.add(offset - prefix.length);
  }
  assert.ok(starts.size <= 2);
  assert.deepEqual(textAround("ab", 1), { prefix: "a", suffix: "b" });
});

test("a question has a longer fence than its code, and lists problems only where they are to be fixed", () => {
  const passage = { path: "a.md", language: "markdown", code: "```py\nx\n```", problems: ["line 2: x is not defined"] };
  assert.match(question("fix", passage), /line 2: x is not defined[\s\S]*\n````markdown\n```py\nx\n```\n````$/);
  assert.ok(!question("explain", passage).includes("not defined"));
});

test("a server runs once it prints its address, and can be stopped", async () => {
  const lines: string[] = [];
  const running = await launch(node("console.log('loading'); console.log('listening on http://127.0.0.1:81'); setInterval(() => {}, 1e6)"),
    line => lines.push(line));
  assert.equal(running.url, "http://127.0.0.1:81");
  assert.equal(lines[0], "loading");
  await running.stop();
  assert.match(await running.exited, /SIGTERM/);
});

test("a server that cannot start gives the reason", async () => {
  await assert.rejects(launch(node("console.error('no such model: x'); process.exit(3)"), () => {}), /ended \(3\): no such model: x/);
  await assert.rejects(launch(["/nowhere/codegemma"], () => {}), /cannot be started: .*ENOENT/);
  await assert.rejects(launch(node("setInterval(() => {}, 1e6)"), () => {}, 50), /did not say where it listens/);
});

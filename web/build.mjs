// node build.mjs page | vscode | test
// page: the site, with a manifest of what it was built from. vscode: the extension's scripts. test: bundles and runs the tests.
import { createHash } from "node:crypto";
import { cpSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join, relative, resolve } from "node:path";
import { spawnSync } from "node:child_process";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const WEB = dirname(fileURLToPath(import.meta.url)), ROOT = resolve(WEB, ".."), PAGE = join(ROOT, "codegemma/serve/web");
const VSCODE = join(ROOT, "editors/vscode");
const COMMON = { bundle: true, minify: true, legalComments: "none", logLevel: "warning", nodePaths: [join(WEB, "node_modules")] };
const BROWSER = { ...COMMON, format: "esm", target: "es2022", loader: { ".ttf": "file" }, assetNames: "[name]" };
const NODE = { ...COMMON, platform: "node", target: "node20" };

const sums = (folder, names) => Object.fromEntries(names.sort().map(name =>
  [name, createHash("sha256").update(readFileSync(join(folder, name))).digest("hex")]));

/** Every file below a folder, as paths from it. */
const files = folder => readdirSync(folder, { recursive: true, withFileTypes: true }).filter(entry => entry.isFile())
  .map(entry => relative(folder, join(entry.parentPath ?? entry.path, entry.name)));

const CHAT = ["marked/LICENSE", "dompurify/LICENSE", "highlight.js/LICENSE"];

function licenses(folder, names) {
  const texts = names.map(name => `--- ${name}\n${readFileSync(join(WEB, "node_modules", name), "utf8").replaceAll("\r", "")}`);
  writeFileSync(join(folder, "licenses.txt"), texts.join("\n"));
}

async function page() {
  rmSync(PAGE, { recursive: true, force: true });
  await build({ ...BROWSER, outdir: PAGE, entryPoints: {
    app: join(WEB, "src/main.ts"),
    "editor.worker": join(WEB, "node_modules/monaco-editor/esm/vs/editor/editor.worker.js"),
  } });
  for (const name of ["index.html", "icon.svg"]) cpSync(join(WEB, "src", name), join(PAGE, name));
  licenses(PAGE, ["monaco-editor/LICENSE", "monaco-editor/ThirdPartyNotices.txt", ...CHAT]);
  const sources = [...readdirSync(join(WEB, "src")).map(name => `src/${name}`), "build.mjs", "package-lock.json"];
  const manifest = { sources: sums(WEB, sources), built: sums(PAGE, readdirSync(PAGE)) };
  writeFileSync(join(PAGE, "manifest.json"), JSON.stringify(manifest, null, 1) + "\n");
}

async function vscode() {
  const out = join(VSCODE, "dist");
  rmSync(out, { recursive: true, force: true });
  const results = [
    await build({ ...NODE, metafile: true, format: "cjs", external: ["vscode"], outfile: join(out, "extension.js"), entryPoints: [join(VSCODE, "src/extension.ts")] }),
    await build({ ...BROWSER, metafile: true, outfile: join(out, "webview.js"), entryPoints: [join(VSCODE, "src/webview.ts")] }),
  ];
  licenses(out, CHAT);
  cpSync(join(ROOT, "LICENSE"), join(out, "LICENSE"));
  const bundled = results.flatMap(({ metafile }) => Object.keys(metafile.inputs)).map(path => relative(ROOT, resolve(path)));
  const shown = ["package.json", "README.md", ...files(join(VSCODE, "media")).map(name => join("media", name))].map(name => join("editors/vscode", name));
  const sources = [...new Set([...bundled.filter(path => !path.includes("node_modules")), ...shown, "web/build.mjs", "web/package-lock.json"])];
  writeFileSync(join(out, "manifest.json"), JSON.stringify({ sources: sums(ROOT, sources) }, null, 1) + "\n");
}

async function test() {
  mkdirSync(join(WEB, "node_modules/.cache"), { recursive: true });
  const out = mkdtempSync(join(WEB, "node_modules/.cache/test-"));
  const folders = [join(WEB, "test"), join(VSCODE, "test")];
  const entryPoints = folders.flatMap(folder => readdirSync(folder).map(name => join(folder, name)));
  await build({ ...NODE, format: "esm", minify: false, sourcemap: "inline", outdir: out, outExtension: { ".js": ".mjs" }, entryPoints });
  const names = readdirSync(out, { recursive: true }).filter(name => name.endsWith(".test.mjs")).map(name => join(out, name));
  const { status } = spawnSync(process.execPath, ["--test", "--enable-source-maps", ...names], { stdio: "inherit" });
  rmSync(out, { recursive: true });
  process.exitCode = status ?? 1;
}

await { page, vscode, test }[process.argv[2]]();

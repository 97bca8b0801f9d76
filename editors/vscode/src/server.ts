/** The server: the configured one, or a process that is started and stopped with the window. */

import * as vscode from "vscode";
import { type About, Client } from "../../../web/src/api.ts";
import { launch, type ServerProcess } from "./process.ts";
import { setting } from "./settings.ts";

const RETRY_MS = 30_000;  // after a failed start, before a suggestion or a chat may start it again

export class Server implements vscode.Disposable {
  private running?: Promise<ServerProcess>;
  private failedAt = -Infinity;
  private stopped = false;

  constructor(private secrets: vscode.SecretStorage, private log: vscode.LogOutputChannel, private changed: (state: string) => void) {}

  /** A client of the server. Rejects where the server cannot be started, or was stopped by a command. */
  async client(): Promise<Client> {
    const key = await this.secrets.get("key"), url = setting("url");
    if (url) return new Client(url, key);
    if (this.stopped) throw new Error("the server was stopped");
    if (Date.now() - this.failedAt < RETRY_MS) throw new Error("the server could not be started: see the log");
    return new Client((await this.start()).url, key);
  }

  /** What the server says of its model; undefined where none answers. */
  async about(): Promise<About | undefined> {
    try { return await (await this.client()).about(); } catch { return undefined; }
  }

  start(): Promise<ServerProcess> {
    this.stopped = false;
    return this.running ??= this.launch();
  }

  async stop(): Promise<void> {
    this.stopped = true;
    const running = this.running;
    this.running = undefined;
    await running?.then(server => server.stop(), () => {});
    this.changed("stopped");
  }

  dispose(): Promise<void> { return this.stop(); }

  private async launch(): Promise<ServerProcess> {
    this.changed("starting");
    try {
      const command = [setting("command"), "serve", "--port", "0", ...setting("arguments")];
      this.log.info(command.join(" "));
      const running = await launch(command, line => this.log.info(line));
      void running.exited.then(reason => {
        if (this.stopped) return;
        this.running = undefined;
        this.log.error(reason);
        this.changed("failed");
      });
      this.changed("ready");
      return running;
    } catch (error) {
      this.running = undefined;
      this.failedAt = Date.now();
      this.log.error(error as Error);
      this.changed("failed");
      throw error;
    }
  }
}

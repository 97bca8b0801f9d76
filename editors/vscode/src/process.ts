/** A server of our own: started, asked where it listens, stopped. */

import { spawn } from "node:child_process";

export interface Running { url: string; exited: Promise<string>; stop(): Promise<void> }

const PATIENCE = 120_000;  // ms to load a model
const GRACE = 10_000;      // ms to save the cache

/** Starts `command`; it is running once it has said where it listens. Rejects with its last words. */
export function launch(command: string[], log: (line: string) => void, patience = PATIENCE): Promise<Running> {
  const [program, ...args] = command;
  const child = spawn(program, args, { stdio: ["ignore", "pipe", "pipe"], windowsHide: true });
  const words: string[] = [];
  const hear = (stream: NodeJS.ReadableStream, found: (line: string) => void): void => {
    let rest = "";
    stream.setEncoding("utf8").on("data", (chunk: string) => {
      const lines = (rest + chunk).split(/\r?\n/);
      rest = lines.pop()!;
      for (const line of lines) {
        words.push(line);
        words.splice(0, words.length - 20);
        log(line);
        found(line);
      }
    });
  };
  const exited = new Promise<string>(resolve => {
    child.once("error", error => resolve(`${program} cannot be started: ${error.message}`));
    child.once("close", (code, signal) => resolve(`${program} ended (${signal ?? code}): ${words.slice(-5).join("\n") || "no output"}`));
  });
  const stop = async (): Promise<void> => {
    child.kill("SIGTERM");
    const last = setTimeout(() => child.kill("SIGKILL"), GRACE);
    await exited;
    clearTimeout(last);
  };
  return new Promise((resolve, reject) => {
    const late = setTimeout(() => {
      void stop();
      reject(new Error(`${program} did not say where it listens within ${patience / 1000} s: see the log`));
    }, patience);
    const found = (line: string): void => {
      const url = /^listening on (http:\/\/\S+)/.exec(line)?.[1];
      if (!url) return;
      clearTimeout(late);
      resolve({ url, exited, stop });
    };
    hear(child.stdout, found);
    hear(child.stderr, () => {});
    void exited.then(why => {
      clearTimeout(late);
      reject(new Error(why));
    });
  });
}

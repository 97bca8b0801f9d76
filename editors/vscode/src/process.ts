/** Starts and stops a server process. */

import { spawn } from "node:child_process";

/** A server that listens at `url`. `exited` resolves with the reason once it has ended. */
export interface ServerProcess { url: string; exited: Promise<string>; stop(): Promise<void> }

const START_MS = 120_000;  // to load a model
const STOP_MS = 10_000;    // to save the cache

/** Starts `command`, and resolves once it prints its URL. Rejects with its last output if it exits before that. */
export function launch(command: string[], log: (line: string) => void, timeout = START_MS): Promise<ServerProcess> {
  const [program, ...args] = command;
  const child = spawn(program, args, { stdio: ["ignore", "pipe", "pipe"], windowsHide: true });
  const lastLines: string[] = [];
  const follow = (stream: NodeJS.ReadableStream, onLine: (line: string) => void): void => {
    let rest = "";
    stream.setEncoding("utf8").on("data", (chunk: string) => {
      const lines = (rest + chunk).split(/\r?\n/);
      rest = lines.pop()!;
      for (const line of lines) {
        lastLines.push(line);
        lastLines.splice(0, lastLines.length - 20);
        log(line);
        onLine(line);
      }
    });
  };
  const exited = new Promise<string>(resolve => {
    child.once("error", error => resolve(`${program} cannot be started: ${error.message}`));
    child.once("close", (code, signal) => resolve(`${program} ended (${signal ?? code}): ${lastLines.slice(-5).join("\n") || "no output"}`));
  });
  const stop = async (): Promise<void> => {
    child.kill("SIGTERM");
    const killTimer = setTimeout(() => child.kill("SIGKILL"), STOP_MS);
    await exited;
    clearTimeout(killTimer);
  };
  return new Promise((resolve, reject) => {
    const startTimer = setTimeout(() => {
      void stop();
      reject(new Error(`${program} did not say where it listens within ${timeout / 1000} s: see the log`));
    }, timeout);
    const findUrl = (line: string): void => {
      const url = /^listening on (http:\/\/\S+)/.exec(line)?.[1];
      if (!url) return;
      clearTimeout(startTimer);
      resolve({ url, exited, stop });
    };
    follow(child.stdout, findUrl);
    follow(child.stderr, () => {});
    void exited.then(reason => {
      clearTimeout(startTimer);
      reject(new Error(reason));
    });
  });
}

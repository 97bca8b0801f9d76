/** The settings under "codegemma"; package.json describes them. */

import * as vscode from "vscode";
import type { Order, Trim } from "../../../web/src/api.ts";

interface Settings {
  url: string; command: string; arguments: string[]; enable: Record<string, boolean>; ignoredFiles: boolean; adapter: string; mode: Order; trim: Trim;
  timeBudget: number; maxTokens: number; delay: number; suggestions: number; prefetch: boolean; contextFiles: number; chatTokens: number; minConfidence: number;
}

export function setting<K extends keyof Settings>(name: K): Settings[K] {
  return vscode.workspace.getConfiguration("codegemma").get(name)!;
}

/** Whether suggestions are on for a language. */
export function enabled(language: string): boolean {
  const { [language]: forLanguage, "*": forOthers } = setting("enable");
  return forLanguage ?? forOthers ?? true;
}

/** Turns suggestions in a language on or off, in the user's settings. */
export async function toggle(language: string): Promise<void> {
  const enable = { ...setting("enable"), [language]: !enabled(language) };
  await vscode.workspace.getConfiguration("codegemma").update("enable", enable, vscode.ConfigurationTarget.Global);
}

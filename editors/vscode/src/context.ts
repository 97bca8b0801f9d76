/** Other open files, the one looked at last nearest to the cursor; secret and ignored ones never. */

import * as vscode from "vscode";
import type { File } from "../../../web/src/api.ts";
import { secret } from "./hole.ts";

const LONGEST = 50_000;   // characters of a file that is worth sending

export class Context implements vscode.Disposable {
  private recent: vscode.TextDocument[] = [];
  private ignored = new Map<string, boolean>();
  private subscriptions = [
    vscode.window.onDidChangeActiveTextEditor(editor => editor && this.see(editor.document)),
    vscode.workspace.onDidCloseTextDocument(document => this.recent = this.recent.filter(one => one !== document)),
  ];

  constructor() { for (const { document } of vscode.window.visibleTextEditors) this.see(document); }

  /** May this document's text leave it? */
  async allows(document: vscode.TextDocument): Promise<boolean> {
    if (!["file", "untitled", "vscode-notebook-cell", "vscode-remote", "vscode-vfs"].includes(document.uri.scheme)) return false;
    if (secret(document.uri.path)) return false;
    const path = document.uri.fsPath;
    if (!this.ignored.has(path)) this.ignored.set(path, await ignored(document.uri));
    return !this.ignored.get(path);
  }

  async files(beside: vscode.TextDocument, most: number): Promise<File[]> {
    const found: File[] = [];
    for (const document of this.recent) {
      if (found.length === most) break;
      if (document === beside || document.uri.scheme !== "file" || document.lineCount > LONGEST) continue;
      const text = document.getText();
      if (text.length <= LONGEST && await this.allows(document))
        found.unshift({ path: vscode.workspace.asRelativePath(document.uri, false), text: text.replace(/\r\n/g, "\n") });
    }
    return found;
  }

  dispose(): void { for (const one of this.subscriptions) one.dispose(); }

  private see(document: vscode.TextDocument): void {
    this.ignored.delete(document.uri.fsPath);
    this.recent = [document, ...this.recent.filter(one => one !== document)].slice(0, 32);
  }
}

/** Asks git, where its extension is there. */
async function ignored(uri: vscode.Uri): Promise<boolean> {
  const git = vscode.extensions.getExtension("vscode.git");
  if (!git || uri.scheme !== "file") return false;
  try {
    const repository = (git.isActive ? git.exports : await git.activate()).getAPI(1).getRepository(uri);
    return repository ? (await repository.checkIgnore([uri.fsPath])).size > 0 : false;
  } catch {
    return false;          // git is switched off
  }
}

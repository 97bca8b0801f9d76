/** Which documents may be sent, and the other open files that go along with a request, the most recent one last, nearest to the cursor. */

import * as vscode from "vscode";
import type { File } from "../../../web/src/api.ts";
import { isSecretName } from "./secrets.ts";

const MAX_CHARACTERS = 50_000;   // longer files are not sent
const MAX_RECENT = 32;           // documents
const LOCAL = ["file", "untitled", "vscode-notebook-cell"];
const SCHEMES = ["file", "untitled", "vscode-notebook-cell", "vscode-remote", "vscode-vfs"];

export class Context implements vscode.Disposable {
  private recent: vscode.TextDocument[] = [];        // the latest first
  private ignored = new Map<string, boolean>();      // by path: does git ignore it?
  private subscriptions = [
    vscode.window.onDidChangeActiveTextEditor(editor => editor && this.remember(editor.document)),
    vscode.workspace.onDidCloseTextDocument(closed => this.recent = this.recent.filter(document => document !== closed)),
  ];

  constructor() { for (const { document } of vscode.window.visibleTextEditors) this.remember(document); }

  /** Whether this document's text may be sent to the server. `ignoredToo`: also if git ignores it. */
  async allows(document: vscode.TextDocument, ignoredToo = false): Promise<boolean> {
    const { scheme, path, fsPath } = document.uri;
    if (!SCHEMES.includes(scheme) || isSecretName(path, document.languageId)) return false;
    if (ignoredToo) return true;
    if (!this.ignored.has(fsPath)) this.ignored.set(fsPath, await isIgnored(document.uri));
    return !this.ignored.get(fsPath);
  }

  /** At most `count` other files; the one that was looked at last comes last. */
  async files(beside: vscode.TextDocument, count: number): Promise<File[]> {
    const files: File[] = [];
    for (const document of this.recent) {
      if (files.length === count) break;
      if (document === beside || document.uri.scheme !== "file" || document.lineCount > MAX_CHARACTERS) continue;
      const text = document.getText();
      if (text.length <= MAX_CHARACTERS && await this.allows(document))
        files.unshift({ path: vscode.workspace.asRelativePath(document.uri, false), text: text.replace(/\r\n/g, "\n") });
    }
    return files;
  }

  dispose(): void { for (const subscription of this.subscriptions) subscription.dispose(); }

  private remember(latest: vscode.TextDocument): void {
    this.ignored.delete(latest.uri.fsPath);
    this.recent = [latest, ...this.recent.filter(document => document !== latest)].slice(0, MAX_RECENT);
  }
}

/** The path that a prompt names a document by; none for one that the editor itself has named, such as Untitled-1. */
export function pathOf({ uri }: vscode.TextDocument): string | undefined {
  return uri.scheme === "untitled" && !uri.path.startsWith("/") ? undefined : vscode.workspace.asRelativePath(uri, false);
}

/** The text to complete and the offset in it at which the document begins: the document, or the cells of its notebook in its language. */
export function wholeText(document: vscode.TextDocument): [Pick<string, "slice">, number] {
  const notebook = vscode.workspace.notebookDocuments.find(each => each.getCells().some(cell => cell.document === document));
  if (!notebook) {
    const slice = (start = 0, end = start): string => document.getText(new vscode.Range(document.positionAt(start), document.positionAt(end)));
    return [{ slice }, 0];
  }
  const cells = notebook.getCells().map(cell => cell.document).filter(cell => cell.languageId === document.languageId);
  const above = cells.slice(0, cells.indexOf(document)).map(cell => cell.getText() + "\n\n").join("");
  return [cells.map(cell => cell.getText()).join("\n\n"), above.length];
}

/** Asks the git extension, if it is installed and enabled. */
async function isIgnored(document: vscode.Uri): Promise<boolean> {
  const git = vscode.extensions.getExtension("vscode.git");
  if (!git || !document.path.startsWith("/") || !LOCAL.includes(document.scheme)) return false;
  const uri = vscode.Uri.file(document.fsPath);          // of a cell, its notebook's
  try {
    const repository = (git.isActive ? git.exports : await git.activate()).getAPI(1).getRepository(uri);
    return repository ? (await repository.checkIgnore([uri.fsPath])).size > 0 : false;
  } catch {
    return false;          // git is switched off
  }
}

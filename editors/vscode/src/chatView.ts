/** The chat in the side bar: the web page's chat in a web view, which asks the server through the extension. */

import { randomBytes } from "node:crypto";
import * as vscode from "vscode";
import type { ToExtension, ToView } from "./messages.ts";
import type { Server } from "./server.ts";
import { setting } from "./settings.ts";

export class ChatView implements vscode.WebviewViewProvider {
  private view?: vscode.WebviewView;
  private waiting: ToView[] = [];        // questions from before the view was ready
  private ready = false;
  private hintText?: string;
  private answers = new Map<number, AbortController>();  // that are being written, by id

  constructor(private context: vscode.ExtensionContext, private server: Server) {}

  /** Sets the text that an empty conversation shows; undefined: the usual one. */
  hint(text?: string): void {
    this.hintText = text;
    if (this.ready) this.post({ type: "hint", text });
  }

  async ask(text: string): Promise<void> {
    await vscode.commands.executeCommand("codegemma.chat.focus");
    if (this.ready) this.post({ type: "question", text });
    else this.waiting.push({ type: "question", text });
  }

  resolveWebviewView(view: vscode.WebviewView): void {
    this.view = view;
    const dist = vscode.Uri.joinPath(this.context.extensionUri, "dist");
    view.webview.options = { enableScripts: true, localResourceRoots: [dist] };
    view.webview.onDidReceiveMessage((message: ToExtension) => this.receive(message));
    view.onDidDispose(() => {
      this.ready = false;
      for (const answer of this.answers.values()) answer.abort();
    });
    const url = (name: string): string => view.webview.asWebviewUri(vscode.Uri.joinPath(dist, name)).toString();
    const nonce = randomBytes(16).toString("base64");
    view.webview.html = `<!doctype html><html lang="en"><head><meta charset="utf-8">
      <meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src ${view.webview.cspSource}; script-src 'nonce-${nonce}'">
      <link rel="stylesheet" href="${url("webview.css")}"></head><body><script nonce="${nonce}" src="${url("webview.js")}"></script></body></html>`;
  }

  private post(message: ToView): void { void this.view?.webview.postMessage(message); }

  private receive(message: ToExtension): void {
    switch (message.type) {
      case "ready":
        this.ready = true;
        this.post({ type: "load", conversations: this.context.workspaceState.get("chats", []) });
        this.post({ type: "hint", text: this.hintText });
        this.waiting.splice(0).forEach(question => this.post(question));
        break;
      case "ask": void this.answer(message.id, message.messages); break;
      case "stop": this.answers.get(message.id)?.abort(); break;
      case "save": void this.context.workspaceState.update("chats", message.conversations.slice(0, 50)); break;
      case "insert": void vscode.window.activeTextEditor?.insertSnippet(new vscode.SnippetString().appendText(message.code)); break;
    }
  }

  private async answer(id: number, messages: (ToExtension & { type: "ask" })["messages"]): Promise<void> {
    const abort = new AbortController();
    this.answers.set(id, abort);
    try {
      const client = await this.server.client();
      const options = { max_tokens: setting("chatTokens"), adapter: setting("adapter") };
      for await (const piece of client.chat(messages, options, abort.signal)) this.post({ type: "piece", id, piece });
      this.post({ type: "end", id });
    } catch (error) {
      this.post({ type: "end", id, error: error instanceof Error ? error.message : String(error) });
    } finally {
      this.answers.delete(id);
    }
  }
}

/** The chat beside the editor: the page's chat in a web view, whose requests go through the extension. */

import { randomBytes } from "node:crypto";
import * as vscode from "vscode";
import type { ToExtension, ToView } from "./messages.ts";
import type { Server } from "./server.ts";
import { setting } from "./settings.ts";

export class ChatView implements vscode.WebviewViewProvider {
  private view?: vscode.WebviewView;
  private waiting: ToView[] = [];        // questions asked before the view was ready
  private ready = false;
  private writing = new Map<number, AbortController>();

  constructor(private context: vscode.ExtensionContext, private server: Server) {}

  async ask(text: string): Promise<void> {
    await vscode.commands.executeCommand("codegemma.chat.focus");
    if (this.ready) this.post({ type: "question", text });
    else this.waiting.push({ type: "question", text });
  }

  resolveWebviewView(view: vscode.WebviewView): void {
    this.view = view;
    const dist = vscode.Uri.joinPath(this.context.extensionUri, "dist");
    view.webview.options = { enableScripts: true, localResourceRoots: [dist] };
    view.webview.onDidReceiveMessage((message: ToExtension) => this.hear(message));
    view.onDidDispose(() => {
      this.ready = false;
      for (const one of this.writing.values()) one.abort();
    });
    const at = (name: string): string => view.webview.asWebviewUri(vscode.Uri.joinPath(dist, name)).toString();
    const nonce = randomBytes(16).toString("base64");
    view.webview.html = `<!doctype html><html lang="en"><head><meta charset="utf-8">
      <meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src ${view.webview.cspSource}; script-src 'nonce-${nonce}'">
      <link rel="stylesheet" href="${at("webview.css")}"></head><body><script nonce="${nonce}" src="${at("webview.js")}"></script></body></html>`;
  }

  private post(message: ToView): void { void this.view?.webview.postMessage(message); }

  private hear(message: ToExtension): void {
    switch (message.type) {
      case "ready":
        this.ready = true;
        this.post({ type: "load", conversations: this.context.workspaceState.get("chats", []) });
        this.waiting.splice(0).forEach(one => this.post(one));
        break;
      case "ask": void this.answer(message.id, message.messages); break;
      case "stop": this.writing.get(message.id)?.abort(); break;
      case "save": void this.context.workspaceState.update("chats", message.conversations.slice(0, 50)); break;
      case "insert": void vscode.window.activeTextEditor?.insertSnippet(new vscode.SnippetString().appendText(message.code)); break;
    }
  }

  private async answer(id: number, messages: (ToExtension & { type: "ask" })["messages"]): Promise<void> {
    const writing = new AbortController();
    this.writing.set(id, writing);
    try {
      const client = await this.server.client();
      const options = { max_tokens: setting("chatTokens"), adapter: setting("adapter") };
      for await (const piece of client.chat(messages, options, writing.signal)) this.post({ type: "piece", id, piece });
      this.post({ type: "end", id });
    } catch (error) {
      this.post({ type: "end", id, error: error instanceof Error ? error.message : String(error) });
    } finally {
      this.writing.delete(id);
    }
  }
}

/** Registers the commands, suggestions, chat and status of the extension. */

import * as vscode from "vscode";
import { type About, chatHint } from "../../../web/src/api.ts";
import type { Suggestion } from "../../../web/src/suggestions.ts";
import { ChatView } from "./chatView.ts";
import { ACCEPTED, Completions } from "./completions.ts";
import { Context } from "./context.ts";
import { type Passage, question, type Task } from "./questions.ts";
import { Server } from "./server.ts";
import { enabled, setting, toggle } from "./settings.ts";

const LINES_AROUND = 40;  // sent on each side of the cursor where nothing is selected and no symbol encloses it

let server: Server;

export function activate(extension: vscode.ExtensionContext): void {
  const log = vscode.window.createOutputChannel("CodeGemma", { log: true });
  const status = new Status();
  let about: About | undefined;  // the server's model, once it has answered
  server = new Server(extension.secrets, log, state => {
    status.show(state);
    if (state === "ready") void describe();
  });
  const context = new Context(), chat = new ChatView(extension, server);
  const completions = new Completions(server, context, (suggestion, ms) => {
    if (suggestion.error) log.warn(String(suggestion.error));
    status.suggested(suggestion, ms);
    if (!about && suggestion.finished && !suggestion.error) void describe();
  });
  const commands: Record<string, () => unknown> = {
    complete: () => vscode.commands.executeCommand("editor.action.inlineSuggest.trigger"),
    explain: () => ask("explain"), fix: () => ask("fix"), tests: () => ask("tests"),
    toggle: async () => { await toggle(language()); status.show(); },
    start: () => server.start(), stop: () => server.stop(), log: () => log.show(), menu: () => menu(!!about?.chat), welcome,
    key: async () => {
      const key = await vscode.window.showInputBox({ prompt: "The API key of the server; leave it empty for none", password: true });
      if (key !== undefined) await (key ? extension.secrets.store("key", key) : extension.secrets.delete("key"));
    },
  };

  /** Asks what the model can do. Menus and walkthrough offer what suits it by these contexts. */
  async function describe(): Promise<void> {
    about = await server.about() ?? about;
    await vscode.commands.executeCommand("setContext", "codegemma.ready", !!about);
    await vscode.commands.executeCommand("setContext", "codegemma.chats", !!about?.chat);
    chat.hint(about && chatHint(about));
  }

  async function ask(task: Task): Promise<void> {
    const hint = about && chatHint(about);
    if (hint) return void vscode.window.showInformationMessage(`CodeGemma: ${hint}`);
    const editor = vscode.window.activeTextEditor;
    if (!editor) return void vscode.window.showInformationMessage("CodeGemma: open a file first.");
    if (!await context.allows(editor.document))
      return void vscode.window.showWarningMessage("CodeGemma: git ignores this file, or files of its name hold credentials; it is not sent.");
    await chat.ask(question(task, await passage(editor)));
  }

  extension.subscriptions.push(
    log, status, context,
    vscode.languages.registerInlineCompletionItemProvider({ pattern: "**" }, completions),
    vscode.commands.registerCommand(ACCEPTED, (id?: string) => completions.outcomes.accept(id)),
    vscode.languages.registerCodeActionsProvider({ pattern: "**" }, { provideCodeActions: (document, range, problems) => about?.chat ? fixes(document, range, problems) : [] }, { providedCodeActionKinds: [vscode.CodeActionKind.QuickFix] }),
    vscode.window.registerWebviewViewProvider("codegemma.chat", chat, { webviewOptions: { retainContextWhenHidden: true } }),
    vscode.window.onDidChangeActiveTextEditor(() => status.show()),
    vscode.workspace.onDidChangeConfiguration(event => {
      if (!event.affectsConfiguration("codegemma")) return;
      completions.suggestions.clear();
      status.show();
      if (event.affectsConfiguration("codegemma.url")) void describe();
    }),
    ...Object.entries(commands).map(([name, run]) => vscode.commands.registerCommand(`codegemma.${name}`, async () => {
      try { await run(); } catch (error) { void vscode.window.showErrorMessage(`CodeGemma: ${error instanceof Error ? error.message : error}`); }
    })),
  );
  if (setting("url")) void describe();
  else server.start().catch(error => offerHelp(String(error.message ?? error)));
}

/** Says that the server could not be started, with what to do about it. */
async function offerHelp(problem: string): Promise<void> {
  const chosen = await vscode.window.showWarningMessage(`CodeGemma: ${problem.split("\n")[0]}`, "Get Started", "Show the Log");
  if (chosen === "Get Started") await welcome();
  if (chosen === "Show the Log") await vscode.commands.executeCommand("codegemma.log");
}

async function welcome(): Promise<void> {
  await vscode.commands.executeCommand("workbench.action.openWalkthrough", "codegemma.codegemma#start");
}

export function deactivate(): Promise<void> { return server.stop(); }

function language(): string { return vscode.window.activeTextEditor?.document.languageId ?? "*"; }

/** The selection, else the innermost function or class around the cursor, else the lines around it. */
async function passage({ document, selection }: vscode.TextEditor): Promise<Passage> {
  let range: vscode.Range = selection;
  if (selection.isEmpty) {
    const { line } = selection.active;
    range = await enclosing(document, selection.active) ?? document.validateRange(new vscode.Range(Math.max(0, line - LINES_AROUND), 0, line + LINES_AROUND + 1, 0));
  }
  const problems = vscode.languages.getDiagnostics(document.uri).filter(problem => problem.range.intersection(range))
    .map(problem => `line ${problem.range.start.line + 1}: ${problem.message}`);
  return { path: vscode.workspace.asRelativePath(document.uri, false), language: document.languageId, code: document.getText(range), problems };
}

/** The range of the innermost symbol around a position. */
async function enclosing(document: vscode.TextDocument, position: vscode.Position): Promise<vscode.Range | undefined> {
  const symbols = await vscode.commands.executeCommand<vscode.DocumentSymbol[]>("vscode.executeDocumentSymbolProvider", document.uri);
  let range: vscode.Range | undefined, level = symbols ?? [];
  for (;;) {
    const symbol = level.find(candidate => candidate.range?.contains(position));
    if (!symbol) return range;
    range = symbol.range;
    level = symbol.children ?? [];
  }
}

function fixes(document: vscode.TextDocument, _: vscode.Range, { diagnostics }: vscode.CodeActionContext): vscode.CodeAction[] {
  if (!diagnostics.length) return [];
  const action = new vscode.CodeAction("Fix with CodeGemma", vscode.CodeActionKind.QuickFix);
  action.command = { command: "codegemma.fix", title: "Fix with CodeGemma" };
  return [action];
}

async function menu(chats: boolean): Promise<void> {
  const on = enabled(language());
  const entries: Record<string, string> = { [`Turn ${on ? "off" : "on"} for ${language()}`]: "codegemma.toggle",
    ...chats ? { "Chat": "codegemma.chat.focus" } : {}, "Get started": "codegemma.welcome", "Start the local server": "codegemma.start", "Stop the local server": "codegemma.stop", "Show the log": "codegemma.log",
    "Settings": "settings" };
  const chosen = await vscode.window.showQuickPick(Object.keys(entries), { title: "CodeGemma" });
  if (chosen && entries[chosen] === "settings") await vscode.commands.executeCommand("workbench.action.openSettings", "@ext:codegemma.codegemma");
  else if (chosen) await vscode.commands.executeCommand(entries[chosen]);
}

/** The entry in the status bar: the state of the server, and how long the last suggestion took. */
class Status implements vscode.Disposable {
  private item = vscode.window.createStatusBarItem("codegemma", vscode.StatusBarAlignment.Right, 100);
  private state = setting("url") ? "ready" : "starting";
  private last = "";

  constructor() {
    this.item.name = "CodeGemma";
    this.item.command = "codegemma.menu";
    this.show();
    this.item.show();
  }

  show(state = this.state): void {
    this.state = state;
    const icon = { starting: "$(loading~spin)", ready: "$(sparkle)", stopped: "$(debug-stop)", failed: "$(error)" }[state];
    const off = !enabled(language());
    this.item.text = `${off ? "$(circle-slash)" : icon} CodeGemma${state === "ready" ? this.last : ""}`;
    this.item.tooltip = `CodeGemma: ${state}${off ? `, off for ${language()}` : ""}`;
    this.item.backgroundColor = state === "failed" ? new vscode.ThemeColor("statusBarItem.errorBackground") : undefined;
  }

  suggested({ error, timings, finished }: Suggestion, ms: number): void {
    if (error) return this.show(this.state === "ready" ? "failed" : this.state);
    if (!finished) return;
    this.last = ` ${ms} ms`;
    this.show("ready");
    if (timings)
      this.item.tooltip = `CodeGemma: ${timings.prompt_n} tokens read, ${timings.cache_n} from the cache, ${timings.predicted_n} generated, ${timings.prompt_ms.toFixed(0)} + ${timings.predicted_ms.toFixed(0)} ms`;
  }

  dispose(): void { this.item.dispose(); }
}

/** Suggestions as ghost text. */

import * as vscode from "vscode";
import type { Infill } from "../../../web/src/api.ts";
import { Outcomes } from "../../../web/src/outcomes.ts";
import { placed, type Suggestion, Suggestions } from "../../../web/src/suggestions.ts";
import { type Context, pathOf, wholeText } from "./context.ts";
import type { Server } from "./server.ts";
import { enabled, setting } from "./settings.ts";
import { textAround } from "./window.ts";

export const ACCEPTED = "codegemma.accepted";  // the command that VS Code runs when a suggestion is accepted
const NOT_SENT = "CodeGemma: git ignores this file (codegemma.ignoredFiles allows it), or files of its name hold credentials; it is not sent.";
const INVOKED = vscode.InlineCompletionTriggerKind.Invoke;

export class Completions implements vscode.InlineCompletionItemProvider {
  readonly suggestions: Suggestions;
  readonly outcomes: Outcomes;

  /** `report` is called with each suggestion and the milliseconds that it took. */
  constructor(server: Server, private context: Context, private report: (suggestion: Suggestion, ms: number) => void) {
    const session = `vscode-${process.pid}-${vscode.env.sessionId}`;
    this.suggestions = new Suggestions(async function* (infill, count, signal) {
      const client = await server.client();
      yield* client.complete(infill, { session, n_cmpl: count, mode: setting("mode"), trim: setting("trim"), adapter: setting("adapter"),
        max_tokens: setting("maxTokens"), time_budget_ms: setting("timeBudget") }, signal);
    });
    this.outcomes = new Outcomes(async (outcome, id) => (await server.client()).report(outcome, id));
  }

  async provideInlineCompletionItems(document: vscode.TextDocument, position: vscode.Position,
      context: vscode.InlineCompletionContext, token: vscode.CancellationToken): Promise<vscode.InlineCompletionItem[]> {
    const invoked = context.triggerKind === INVOKED, started = Date.now();
    if (!invoked && !enabled(document.languageId)) return [];
    if (!await this.context.allows(document, setting("ignoredFiles"))) {
      if (invoked) void vscode.window.showInformationMessage(NOT_SENT);
      return [];
    }
    const infill = await this.infill(document, position, context.selectedCompletionInfo);
    if (token.isCancellationRequested) return [];
    const suggestion = await this.suggest(infill, invoked, token);
    if (!suggestion) return [];
    this.report(suggestion, Date.now() - started);
    if (token.isCancellationRequested || !suggestion.finished || !suggestion.visible(setting("minConfidence"))) return [];
    if (setting("prefetch")) setTimeout(() => this.suggestions.prefetch(suggestion));
    this.outcomes.show(suggestion);
    return this.items(suggestion, infill, document, position, context.selectedCompletionInfo);
  }

  private async suggest(infill: Infill, invoked: boolean, token: vscode.CancellationToken): Promise<Suggestion | undefined> {
    const count = invoked ? setting("suggestions") : 1;
    let known = this.suggestions.find(infill, count);
    if (!known) {
      if (!invoked) await new Promise(resolve => setTimeout(resolve, setting("delay")));
      if (token.isCancellationRequested) return;
      known = this.suggestions.start(infill, count);
    }
    const suggestion = known;
    suggestion.requested ||= invoked;
    // With text it continues, since the user may be typing that text; without, it would delay the next suggestion.
    token.onCancellationRequested(() => { if (!suggestion.texts[0]) suggestion.cancel(); });
    await suggestion.done;
    return suggestion;
  }

  /** What the server is asked to complete. While the pop-up of plain completions is open, its selected entry counts as typed. */
  private async infill(document: vscode.TextDocument, position: vscode.Position,
      selected?: vscode.SelectedCompletionInfo): Promise<Infill> {
    const [text, start] = wholeText(document), path = pathOf(document);
    const { prefix, suffix } = textAround(text, start + document.offsetAt(position));
    const replaced = selected ? document.offsetAt(position) - document.offsetAt(selected.range.start) : 0;
    const normalize = (part: string): string => part.replace(/\r\n/g, "\n");
    return { prefix: normalize(prefix.slice(0, prefix.length - replaced)) + (selected?.text ?? ""), suffix: normalize(suffix), path,
             language: document.languageId, context: await this.context.files(document, setting("contextFiles")) };
  }

  private items(suggestion: Suggestion, infill: Infill, document: vscode.TextDocument, position: vscode.Position,
      selected?: vscode.SelectedCompletionInfo): vscode.InlineCompletionItem[] {
    const restOfLine = document.lineAt(position.line).text.slice(position.character), start = selected?.range.start ?? position;
    return (suggestion.remaining(infill) ?? []).filter(Boolean).map(text => {
      const { insert, replaced } = placed(text, restOfLine);
      const end = selected && !replaced ? selected.range.end : position.translate(0, replaced);
      const accepted = { command: ACCEPTED, title: "Accepted", arguments: [suggestion.id(infill, text)] };
      return new vscode.InlineCompletionItem((selected?.text ?? "") + insert, new vscode.Range(start, end), accepted);
    });
  }
}

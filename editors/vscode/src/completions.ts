/** Ghost text. */

import * as vscode from "vscode";
import type { Hole } from "../../../web/src/api.ts";
import { Outcomes } from "../../../web/src/outcomes.ts";
import { placed, type Suggestion, Suggestions } from "../../../web/src/suggestions.ts";
import type { Context } from "./context.ts";
import { around } from "./hole.ts";
import type { Server } from "./server.ts";
import { enabled, setting } from "./settings.ts";

export const ACCEPTED = "codegemma.accepted";  // what VS Code runs when a suggestion is taken
const INVOKED = vscode.InlineCompletionTriggerKind.Invoke;

export class Completions implements vscode.InlineCompletionItemProvider {
  readonly suggestions: Suggestions;
  readonly outcomes: Outcomes;

  constructor(server: Server, private context: Context, private report: (one: Suggestion, ms: number) => void) {
    const session = `vscode-${process.pid}-${vscode.env.sessionId}`;
    this.suggestions = new Suggestions(async function* (hole, count, signal) {
      const client = await server.client();
      yield* client.complete(hole, { session, n_cmpl: count, mode: setting("mode"), trim: setting("trim"), adapter: setting("adapter"),
        max_tokens: setting("maxTokens"), time_budget_ms: setting("timeBudget") }, signal);
    });
    this.outcomes = new Outcomes(async (outcome, id) => (await server.client()).tell(outcome, id));
  }

  async provideInlineCompletionItems(document: vscode.TextDocument, position: vscode.Position,
      context: vscode.InlineCompletionContext, token: vscode.CancellationToken): Promise<vscode.InlineCompletionItem[]> {
    const invoked = context.triggerKind === INVOKED, began = Date.now();
    if ((!invoked && !enabled(document.languageId)) || !await this.context.allows(document)) return [];
    const hole = await this.hole(document, position, context.selectedCompletionInfo);
    if (token.isCancellationRequested) return [];
    const one = await this.suggested(hole, invoked, token);
    if (!one) return [];
    this.report(one, Date.now() - began);
    if (token.isCancellationRequested || !one.finished) return [];
    if (setting("prefetch")) setTimeout(() => this.suggestions.prefetch(one));
    this.outcomes.show(one);
    return this.items(one, hole, document, position, context.selectedCompletionInfo);
  }

  private async suggested(hole: Hole, invoked: boolean, token: vscode.CancellationToken): Promise<Suggestion | undefined> {
    const count = invoked ? setting("suggestions") : 1;
    let one = this.suggestions.find(hole, count);
    if (!one) {
      if (!invoked) await new Promise(resolve => setTimeout(resolve, setting("delay")));
      if (token.isCancellationRequested) return;
      one = this.suggestions.start(hole, count);
    }
    const asked = one;     // a text that has begun may be typed along; what has not is in the way of the next
    token.onCancellationRequested(() => { if (!asked.texts[0]) asked.cancel(); });
    await one.done;
    return one;
  }

  /** With the list of plain completions open, the chosen one counts as typed. */
  private async hole(document: vscode.TextDocument, position: vscode.Position,
      selected?: vscode.SelectedCompletionInfo): Promise<Hole> {
    const text = document.getText(), path = vscode.workspace.asRelativePath(document.uri, false);
    const { prefix, suffix } = around(text, document.offsetAt(position));
    const replaced = selected ? document.offsetAt(position) - document.offsetAt(selected.range.start) : 0;
    const plain = (part: string): string => part.replace(/\r\n/g, "\n");
    return { prefix: plain(prefix.slice(0, prefix.length - replaced)) + (selected?.text ?? ""), suffix: plain(suffix), path,
             language: document.languageId, context: await this.context.files(document, setting("contextFiles")) };
  }

  private items(one: Suggestion, hole: Hole, document: vscode.TextDocument, position: vscode.Position,
      selected?: vscode.SelectedCompletionInfo): vscode.InlineCompletionItem[] {
    const rest = document.lineAt(position.line).text.slice(position.character), start = selected?.range.start ?? position;
    return (one.left(hole) ?? []).filter(Boolean).map(text => {
      const { insert, replaced } = placed(text, rest);
      const end = selected && !replaced ? selected.range.end : position.translate(0, replaced);
      const accepted = { command: ACCEPTED, title: "Accepted", arguments: [one.id(hole, text)] };
      return new vscode.InlineCompletionItem((selected?.text ?? "") + insert, new vscode.Range(start, end), accepted);
    });
  }
}

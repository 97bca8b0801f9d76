/** Reports to the server which suggestions were accepted, for the statistics in its local file (`codegemma stats`). */

import type { Outcome } from "./api.ts";
import type { Suggestion } from "./suggestions.ts";

export const GRACE_MS = 1000;  // an acceptance may be reported after the next suggestion is shown

export class Outcomes {
  private shown?: Suggestion;

  constructor(private report: (outcome: Outcome, id: string) => Promise<unknown>) {}

  /** Called when a suggestion is shown in place of the last one. */
  show(suggestion: Suggestion): void {
    if (suggestion === this.shown) return;
    const last = this.shown?.ids[0];
    if (last) setTimeout(() => this.send("dismiss", last), GRACE_MS);  // the server counts the first report
    this.shown = suggestion;
    void suggestion.done.then(() => this.send("view", suggestion.ids[0]));
  }

  /** Called when a text is accepted. Without an id it is still being generated; the editor will report it again. */
  accept(id?: string): void {
    if (!id) return;
    this.shown = undefined;
    this.send("select", id);
  }

  private send(outcome: Outcome, id?: string): void {
    if (id) this.report(outcome, id).catch(() => {});  // statistics are not worth an error
  }
}

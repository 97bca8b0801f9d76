/** Reports to the server which suggestions were accepted, for the statistics in its local file (`codegemma stats`). */

import type { Outcome } from "./api.ts";
import type { Suggestion } from "./suggestions.ts";

export const GRACE = 1000;  // ms: an acceptance may be reported after the next suggestion is shown

export class Outcomes {
  private shown?: Suggestion;

  constructor(private report: (outcome: Outcome, id: string) => Promise<unknown>) {}

  /** This suggestion is shown now; the last one no longer is. */
  show(suggestion: Suggestion): void {
    if (suggestion === this.shown) return;
    const last = this.shown?.ids[0];
    if (last) setTimeout(() => this.say("dismiss", last), GRACE);  // the server counts the first report
    this.shown = suggestion;
    void suggestion.done.then(() => this.say("view", suggestion.ids[0]));
  }

  /** A text was accepted. While it is still being generated it has no id, and the editor reports it again. */
  accept(id?: string): void {
    if (!id) return;
    this.shown = undefined;
    this.say("select", id);
  }

  private say(outcome: Outcome, id?: string): void {
    if (id) this.report(outcome, id).catch(() => {});  // statistics are not worth an error
  }
}

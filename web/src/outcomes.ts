/** What became of suggestions: told to the server, which keeps figures of it in a local file (`codegemma stats`). */

import type { Outcome } from "./api.ts";
import type { Suggestion } from "./suggestions.ts";

export const GRACE = 1000;  // ms: an acceptance may be heard of after the next suggestion is shown

export class Outcomes {
  private shown?: Suggestion;

  constructor(private tell: (outcome: Outcome, id: string) => Promise<unknown>) {}

  /** This one is on the screen; the one before is not any more. */
  show(one: Suggestion): void {
    if (one === this.shown) return;
    const last = this.shown?.ids[0];
    if (last) setTimeout(() => this.say("dismiss", last), GRACE);  // the server counts what it hears first
    this.shown = one;
    void one.done.then(() => this.say("view", one.ids[0]));
  }

  /** A text was taken. One that is still being written has no id, and is heard of again. */
  accept(id?: string): void {
    if (!id) return;
    this.shown = undefined;
    this.say("select", id);
  }

  private say(outcome: Outcome, id?: string): void {
    if (id) this.tell(outcome, id).catch(() => {});  // figures are not worth an error
  }
}

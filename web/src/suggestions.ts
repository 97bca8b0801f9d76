/** Suggestions while one types: what was suggested is typed along without asking again, the next one is fetched before
 *  it is needed, and a new question cancels the older ones. */

import type { Hole, Piece, Timings } from "./api.ts";

export type Ask = (hole: Hole, count: number, signal: AbortSignal) => AsyncIterable<Piece>;

const KEPT = 32;          // suggestions remembered

export class Suggestion {
  texts: string[];                      // the likeliest first; they grow as they are written
  ids: (string | undefined)[] = [];     // the server's, of each text that is whole
  timings?: Timings;
  error?: unknown;
  finished = false;
  readonly done: Promise<void>;
  readonly begun: Promise<void>;        // there is a text to show, or none will come
  private begin = (): void => {};
  private abort = new AbortController();

  constructor(readonly hole: Hole, ask: Ask, readonly count: number, changed: () => void) {
    this.texts = Array(count).fill("");
    this.begun = new Promise(resolve => this.begin = resolve);
    this.done = this.read(ask, changed).catch(error => {
      if (!this.cancelled) this.error = error;
      this.abort.abort();
    }).then(() => {
      const first = [...new Set(this.texts)].map(text => this.texts.indexOf(text));
      [this.texts, this.ids] = [first.map(at => this.texts[at]), first.map(at => this.ids[at])];
      this.finished = !this.cancelled;
      this.begin();
      changed();
    });
  }

  get cancelled(): boolean { return this.abort.signal.aborted; }

  /** Ends it, wherever it is; no error comes of it. */
  cancel(): void { if (!this.finished) this.abort.abort(); }

  /** What is left of each text that begins with what was typed since; undefined: this suggestion is of another place. */
  left(hole: Hole): string[] | undefined {
    if (hole.path !== this.hole.path || hole.suffix !== this.hole.suffix || !hole.prefix.startsWith(this.hole.prefix)) return;
    const typed = hole.prefix.slice(this.hole.prefix.length);
    const fitting = this.texts.filter(text => text.startsWith(typed) && (!typed || text.length > typed.length));
    return fitting.length ? fitting.map(text => text.slice(typed.length)) : undefined;
  }

  /** The id of the text of which `rest` is left. */
  id(hole: Hole, rest: string): string | undefined {
    return this.ids[this.texts.indexOf(hole.prefix.slice(this.hole.prefix.length) + rest)];
  }

  private async read(ask: Ask, changed: () => void): Promise<void> {
    for await (const { text, index = 0, timings, id } of ask(this.hole, this.count, this.abort.signal)) {
      this.texts[index] += text;
      if (id) this.ids[index] = id;
      if (timings?.stop === "cancelled") this.abort.abort();
      if (!index) this.timings = timings ?? this.timings;
      if (text) this.begin();
      changed();
    }
  }
}

export class Suggestions {
  private kept: Suggestion[] = [];

  constructor(private ask: Ask, private changed: (suggestion: Suggestion) => void = () => {}) {}

  /** A suggestion that covers the hole, perhaps one that is still being written; the newest wins. */
  find(hole: Hole, count = 1): Suggestion | undefined {
    return this.kept.findLast(one => !one.cancelled && !one.error && one.count >= count && one.left(hole));
  }

  /** Asks for `count` suggestions and cancels whatever else is being written. */
  start(hole: Hole, count = 1): Suggestion {
    this.cancel();
    const suggestion: Suggestion = new Suggestion(hole, this.ask, count, () => this.changed(suggestion));
    this.kept = [...this.kept, suggestion].slice(-KEPT);
    return suggestion;
  }

  /** Fetches what would be suggested once this suggestion is accepted. */
  prefetch({ hole, texts: [text], finished }: Suggestion): void {
    const next = { ...hole, prefix: hole.prefix + text };
    if (finished && text && !this.find(next)) this.start(next);
  }

  cancel(): void {
    for (const one of this.kept) one.cancel();
    this.kept = this.kept.filter(one => one.finished && !one.error);
  }

  clear(): void {
    this.cancel();
    this.kept = [];
  }
}

/** A text of several lines must replace the rest of the cursor's line, which then stands at its own end. */
export function placed(text: string, restOfLine: string): { insert: string; replaced: number } {
  return text.includes("\n") ? { insert: text + restOfLine, replaced: restOfLine.length } : { insert: text, replaced: 0 };
}

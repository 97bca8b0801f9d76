/** Suggestions while the user types: typing along a suggestion sends no new request, the next one is fetched before
 *  it is needed, and a new request cancels the older ones. */

import type { Infill, Piece, Timings } from "./api.ts";

export type Ask = (infill: Infill, count: number, signal: AbortSignal) => AsyncIterable<Piece>;

const MAX_REMEMBERED = 32;          // suggestions

export class Suggestion {
  texts: string[];                      // the likeliest first; they grow while they are generated
  ids: (string | undefined)[] = [];     // the server's, of each complete text
  timings?: Timings;
  confidence = 1;                       // of the likeliest text, once it is complete
  requested = false;                    // by key, button or command; others come by themselves
  error?: unknown;
  finished = false;
  readonly done: Promise<void>;
  readonly firstText: Promise<void>;    // resolves when there is text to show, or none will come
  private begin = (): void => {};
  private abort = new AbortController();

  constructor(readonly infill: Infill, ask: Ask, readonly count: number, changed: () => void) {
    this.texts = Array(count).fill("");
    this.firstText = new Promise(resolve => this.begin = resolve);
    this.done = this.read(ask, changed).catch(error => {
      if (!this.cancelled) this.error = error;
      this.abort.abort();
    }).then(() => {
      const first = [...new Set(this.texts)].map(text => this.texts.indexOf(text));
      [this.texts, this.ids] = [first.map(index => this.texts[index]), first.map(index => this.ids[index])];
      this.finished = !this.cancelled;
      this.begin();
      changed();
    });
  }

  get cancelled(): boolean { return this.abort.signal.aborted; }

  /** Stops the request. That does not count as an error. */
  cancel(): void { if (!this.finished) this.abort.abort(); }

  /** Whether to show it now: always if the user requested it, else once it is complete and the model is that sure of it. */
  visible(minConfidence: number): boolean {
    return this.requested || !minConfidence || (this.finished && this.confidence >= minConfidence);
  }

  /** The rest of each text that starts with what was typed since; undefined if the suggestion does not fit here. */
  remaining(infill: Infill): string[] | undefined {
    if (infill.path !== this.infill.path || infill.suffix !== this.infill.suffix || !infill.prefix.startsWith(this.infill.prefix)) return;
    const typed = infill.prefix.slice(this.infill.prefix.length);
    const fitting = this.texts.filter(text => text.startsWith(typed) && (!typed || text.length > typed.length));
    return fitting.length ? fitting.map(text => text.slice(typed.length)) : undefined;
  }

  /** The id of the text of which `rest` is still to be typed. */
  id(infill: Infill, rest: string): string | undefined {
    return this.ids[this.texts.indexOf(infill.prefix.slice(this.infill.prefix.length) + rest)];
  }

  private async read(ask: Ask, changed: () => void): Promise<void> {
    for await (const { text, index = 0, timings, id, confidence } of ask(this.infill, this.count, this.abort.signal)) {
      this.texts[index] += text;
      if (id) this.ids[index] = id;
      if (timings?.stop === "cancelled") this.abort.abort();
      if (!index) [this.timings, this.confidence] = [timings ?? this.timings, confidence ?? this.confidence];
      if (text) this.begin();
      changed();
    }
  }
}

export class Suggestions {
  private remembered: Suggestion[] = [];

  constructor(private ask: Ask, private changed: (suggestion: Suggestion) => void = () => {}) {}

  /** The newest suggestion that fits, perhaps one that is still being generated. */
  find(infill: Infill, count = 1): Suggestion | undefined {
    return this.remembered.findLast(suggestion => !suggestion.cancelled && !suggestion.error && suggestion.count >= count && suggestion.remaining(infill));
  }

  /** Asks for `count` suggestions and cancels all others that are being generated. */
  start(infill: Infill, count = 1): Suggestion {
    this.cancel();
    const suggestion: Suggestion = new Suggestion(infill, this.ask, count, () => this.changed(suggestion));
    this.remembered = [...this.remembered, suggestion].slice(-MAX_REMEMBERED);
    return suggestion;
  }

  /** Fetches what would be suggested once this suggestion is accepted. */
  prefetch({ infill, texts: [text], finished }: Suggestion): void {
    const next = { ...infill, prefix: infill.prefix + text };
    if (finished && text && !this.find(next)) this.start(next);
  }

  cancel(): void {
    for (const suggestion of this.remembered) suggestion.cancel();
    this.remembered = this.remembered.filter(suggestion => suggestion.finished && !suggestion.error);
  }

  clear(): void {
    this.cancel();
    this.remembered = [];
  }
}

/** What to insert: a text of several lines replaces the rest of the line at the cursor, and ends with that rest. */
export function placed(text: string, restOfLine: string): { insert: string; replaced: number } {
  return text.includes("\n") ? { insert: text + restOfLine, replaced: restOfLine.length } : { insert: text, replaced: 0 };
}

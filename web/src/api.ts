/** The client of a codegemma server, for the page and for the editor: completion and chat as streams of pieces. */

export interface File { path: string; text: string }

/** What the editor knows: text before and after the cursor, this file's path and language, and other files. */
export interface Hole { prefix: string; suffix: string; path?: string; language?: string; context?: File[] }

export type Order = "auto" | "psm" | "spm" | "prefix";
export type Trim = "none" | "line" | "block";

/** Fields of a request under the server's own names. */
export interface Options {
  adapter?: string;        // "auto", "none", or an adapter's name
  mode?: Order;
  trim?: Trim;
  max_tokens: number;
  n_cmpl?: number;         // suggestions: the likeliest, then drawn ones
  time_budget_ms?: number; // until the first token; it sizes the prompt
  temperature?: number;
  seed?: number;
  session?: string;        // the newest completion of a session cancels its older ones
}

/** What a request cost: tokens read, taken from the cache and written, and the time for it. */
export interface Timings {
  prompt_n: number; cache_n: number; prompt_ms: number; predicted_n: number; predicted_ms: number; queue_ms: number;
  mode: Order | null; adapter: string | null; stop: string;
}

/** What was written since the piece before; `index` tells several suggestions apart. The last one has the suggestion's `id`. */
export interface Piece { text: string; index?: number; timings?: Timings; id?: string }

export type Outcome = "view" | "select" | "dismiss";

export interface Message { role: "user" | "assistant" | "system"; content: string }

/** What serves: the model's name and what it can do. */
export interface About { model: string; title: string; adapters: string[]; mode: Order; chat: boolean; version: string }

export class ServerError extends Error {
  constructor(readonly status: number, message: string) { super(message); }
}

/** The `data:` payloads of an event stream, until it ends or says [DONE]. Chunks may split lines and characters. */
export async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = body.getReader(), decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      const lines = (rest + (done ? decoder.decode() + "\n" : decoder.decode(value, { stream: true }))).split("\n");
      rest = lines.pop()!;
      for (const line of lines) {
        const data = /^data: ?(.*?)\r?$/.exec(line)?.[1];
        if (data === "[DONE]") return;
        if (data !== undefined) yield data;
      }
      if (done) return;
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

export class Client {
  constructor(readonly base: string, private key = "") {}

  async about(signal?: AbortSignal): Promise<About> {
    return (await (await this.send("props", undefined, signal)).json()).codegemma;
  }

  async healthy(signal?: AbortSignal): Promise<boolean> {
    return this.send("health", undefined, signal).then(() => true, () => false);
  }

  /** The text of the hole as it is written; the last piece has the timings. */
  async *complete(hole: Hole, options: Options, signal?: AbortSignal): AsyncGenerator<Piece> {
    const { max_tokens: n_predict, ...rest } = options;
    const body = {
      input_prefix: hole.prefix, input_suffix: hole.suffix, prompt: "", path: hole.path, language: hole.language,
      input_extra: hole.context?.map(({ path, text }) => ({ filename: path, text })), n_predict, ...rest,
    };
    for await (const { content, index, timings, id } of this.stream("infill", body, signal))
      yield { text: content ?? "", index, timings, id };
  }

  /** What became of a suggestion, for the server's local figures. */
  async tell(type: Outcome, completion_id: string): Promise<void> {
    await this.send("v1/events", { type, completion_id, choice_index: 0 });
  }

  /** The next turn as it is written; the last piece has the timings. */
  async *chat(messages: Message[], options: Options, signal?: AbortSignal): AsyncGenerator<Piece> {
    for await (const { choices, timings } of this.stream("v1/chat/completions", { messages, ...options }, signal))
      yield { text: choices?.[0]?.delta?.content ?? "", timings };
  }

  private async *stream(path: string, body: object, signal?: AbortSignal): AsyncGenerator<any> {
    const reply = await this.send(path, { ...body, stream: true }, signal);
    for await (const data of events(reply.body!)) {
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.code ?? 500, said(event));
      yield event;
    }
  }

  private async send(path: string, body?: unknown, signal?: AbortSignal): Promise<Response> {
    const headers: Record<string, string> = body === undefined ? {} : { "Content-Type": "application/json" };
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    const method = body === undefined ? "GET" : "POST";
    const url = `${this.base.replace(/\/+$/, "")}/${path}`;
    const reply = await fetch(url, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal });
    if (reply.ok) return reply;
    const text = await reply.text();
    let message = text;
    try { message = said(JSON.parse(text)); } catch { /* not JSON: the text itself says it */ }
    throw new ServerError(reply.status, message || reply.statusText);
  }
}

function said(reply: any): string {
  return String(reply.error?.message ?? reply.error ?? reply.detail ?? reply);
}

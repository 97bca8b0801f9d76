/** The client of a codegemma server, for the page and for the editor: completion and chat as streams of pieces. */

export interface File { path: string; text: string }

/** What an editor sends: the text before and after the cursor, this file's path and language, and other files. */
export interface Infill { prefix: string; suffix: string; path?: string; language?: string; context?: File[] }

export type Order = "auto" | "psm" | "spm" | "prefix";
export type Trim = "auto" | "none" | "line" | "block";

/** The fields of a request under the names that the server uses. */
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

/** The cost of a request: tokens read, taken from the cache and generated, and the times. */
export interface Timings {
  prompt_n: number; cache_n: number; prompt_ms: number; predicted_n: number; predicted_ms: number; queue_ms: number;
  mode: Order | null; adapter: string | null; stop: string;
}

/** Text generated since the last piece. `index` numbers several suggestions; the last piece of one has its `id` and,
 *  from 0 to 1, how sure the model is of it. */
export interface Piece { text: string; index?: number; timings?: Timings; id?: string; confidence?: number }

export type Outcome = "view" | "select" | "dismiss";

export interface Message { role: "user" | "assistant" | "system"; content: string }

/** The served model: its name and what it can do. */
export interface About { model: string; title: string; adapters: string[]; mode: Order; chat: boolean; version: string }

/** What a chat says before the first question to a model that was not tuned for it; undefined for others. */
export function chatHint({ chat, title }: About): string | undefined {
  return chat ? undefined : `${title} was not tuned to chat: it continues the text. Serve an instruction-tuned model (-m 7b-it).`;
}

export class ServerError extends Error {
  /** `status` is 0 where no answer came. */
  constructor(readonly status: number, message: string) { super(message); }
}

/** What browsers and Node call "Failed to fetch", "network error" or "terminated". An abort by the caller stays one. */
function unreachable(error: unknown, message: string): unknown {
  return error instanceof TypeError ? new ServerError(0, message) : error;
}

/** The `data:` payloads of an event stream, until it ends or sends [DONE]. Chunks may split lines and characters. */
export async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = body.getReader(), decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(error => { throw unreachable(error, "the server broke off its answer"); });
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

  /** The text in the middle as it is generated; the last piece has the timings. */
  async *complete(infill: Infill, options: Options, signal?: AbortSignal): AsyncGenerator<Piece> {
    const { max_tokens: n_predict, ...rest } = options;
    const body = {
      input_prefix: infill.prefix, input_suffix: infill.suffix, prompt: "", path: infill.path, language: infill.language,
      input_extra: infill.context?.map(({ path, text }) => ({ filename: path, text })), n_predict, ...rest,
    };
    for await (const { content, index, timings, id, confidence } of this.stream("infill", body, signal))
      yield { text: content ?? "", index, timings, id, confidence: confidence ?? undefined };
  }

  /** Tells the server, for its local statistics, whether a suggestion was accepted. */
  async report(type: Outcome, completion_id: string): Promise<void> {
    await this.send("v1/events", { type, completion_id, choice_index: 0 });
  }

  /** The next turn as it is generated; the last piece has the timings. */
  async *chat(messages: Message[], options: Options, signal?: AbortSignal): AsyncGenerator<Piece> {
    for await (const { choices, timings } of this.stream("v1/chat/completions", { messages, ...options }, signal))
      yield { text: choices?.[0]?.delta?.content ?? "", timings };
  }

  private async *stream(path: string, body: object, signal?: AbortSignal): AsyncGenerator<any> {
    const reply = await this.send(path, { ...body, stream: true }, signal);
    for await (const data of events(reply.body!)) {
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.code ?? 500, errorMessage(event));
      yield event;
    }
  }

  private async send(path: string, body?: unknown, signal?: AbortSignal): Promise<Response> {
    const headers: Record<string, string> = body === undefined ? {} : { "Content-Type": "application/json" };
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    const method = body === undefined ? "GET" : "POST";
    const url = `${this.base.replace(/\/+$/, "")}/${path}`;
    const reply = await fetch(url, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal })
      .catch(error => { throw unreachable(error, "the server does not answer"); });
    if (reply.ok) return reply;
    const text = await reply.text();
    let message = text;
    try { message = errorMessage(JSON.parse(text)); } catch { /* not JSON: the text itself is the message */ }
    throw new ServerError(reply.status, message || reply.statusText);
  }
}

function errorMessage(reply: any): string {
  return String(reply.error?.message ?? reply.error ?? reply.detail ?? reply);
}

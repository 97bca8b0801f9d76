import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { test } from "node:test";
import { Client, events, type Piece, ServerError } from "../src/api.ts";

type Handler = (body: any, reply: ServerResponse, request: IncomingMessage) => void;

async function served<T>(handler: Handler, use: (client: Client) => Promise<T>): Promise<T> {
  const server = createServer((request, reply) => {
    let text = "";
    request.setEncoding("utf8").on("data", part => text += part);
    request.on("end", () => handler(text ? JSON.parse(text) : undefined, reply, request));
  }).listen(0, "127.0.0.1");
  await once(server, "listening");
  try {
    return await use(new Client(`http://127.0.0.1:${(server.address() as AddressInfo).port}/`, "secret"));
  } finally {
    server.closeAllConnections();
    server.close();
  }
}

async function all<T>(stream: AsyncIterable<T>): Promise<T[]> {
  const items: T[] = [];
  for await (const item of stream) items.push(item);
  return items;
}

function stream(bytes: Uint8Array, size: number): ReadableStream<Uint8Array> {
  return new ReadableStream({ start(controller) {
    for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
    controller.close();
  } });
}

test("events are whole wherever the network cuts them", async () => {
  const bytes = new TextEncoder().encode('data: {"a":"é漢"}\r\n\r\n: note\ndata:2\n\ndata: last\n\ndata: [DONE]\n\ndata: never\n\n');
  for (let size = 1; size <= bytes.length; size++)
    assert.deepEqual(await all(events(stream(bytes, size))), ['{"a":"é漢"}', "2", "last"]);
});

test("a stream that ends without [DONE] gives what it said", async () => {
  assert.deepEqual(await all(events(stream(new TextEncoder().encode("data: 1\n\ndata: 2"), 4))), ["1", "2"]);
});

test("a completion sends the infill under llama.cpp's names and our fields, with the key", async () => {
  const timings = { prompt_n: 3, cache_n: 9, prompt_ms: 1, predicted_n: 2, predicted_ms: 4, queue_ms: 0, mode: "spm", adapter: null, stop: "end" };
  const [pieces, sent] = await served<[Piece[], any]>((body, reply, request) => {
    Object.assign(sentBody, body, { key: request.headers.authorization, path_: request.url });
    reply.end(`data: {"content":"a","index":0,"stop":false}\n\ndata: {"content":"b","index":0,"stop":true,"id":"c-1","timings":${JSON.stringify(timings)}}\n\n`);
  }, async client => [await all(client.complete({ prefix: "x = ", suffix: "\n", path: "m.py", language: "python", context: [{ path: "o.py", text: "y" }] },
    { max_tokens: 7, mode: "spm", n_cmpl: 2, time_budget_ms: 300 })), sentBody]);
  assert.equal(pieces.map(piece => piece.text).join(""), "ab");
  assert.deepEqual([pieces[1].timings, pieces[1].id], [timings, "c-1"]);
  assert.deepEqual(sent, { input_prefix: "x = ", input_suffix: "\n", prompt: "", path: "m.py", language: "python", input_extra: [{ filename: "o.py", text: "y" }],
    n_predict: 7, mode: "spm", n_cmpl: 2, time_budget_ms: 300, stream: true, key: "Bearer secret", path_: "/infill" });
});
const sentBody: Record<string, unknown> = {};

test("an error is the server's own sentence, also in the middle of a stream", async () => {
  await served((_, reply) => {
    reply.statusCode = 400;
    reply.end('{"error":{"code":400,"message":"prompt has 9 tokens too many"}}');
  }, client => assert.rejects(all(client.chat([], { max_tokens: 1 })), (error: ServerError) =>
    error.status === 400 && error.message === "prompt has 9 tokens too many"));
  await served((_, reply) => reply.end('data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: {"error":{"message":"it broke"}}\n\n'),
    client => assert.rejects(all(client.chat([], { max_tokens: 1 })), /it broke/));
  await served((_, reply) => { reply.statusCode = 502; reply.end("bad gateway"); },
    client => assert.rejects(client.about(), /bad gateway/));
});

test("a server that is gone, or goes in the middle, is told in our words, and an abort is none of them", async () => {
  const gone = new Client("http://127.0.0.1:9");
  for (const call of [() => gone.about(), () => all(gone.chat([], { max_tokens: 1 })), () => all(gone.complete({ prefix: "", suffix: "" }, { max_tokens: 1 })),
      () => gone.report("view", "c")])
    await assert.rejects(call(), (error: ServerError) => error.status === 0 && error.message === "the server does not answer");
  await served((_, reply) => { reply.write('data: {"content":"a"}\n\n'); setTimeout(() => reply.destroy(), 20); }, client =>
    assert.rejects(all(client.complete({ prefix: "", suffix: "" }, { max_tokens: 1 })), (error: ServerError) =>
      error.status === 0 && error.message === "the server broke off its answer"));
  await assert.rejects(gone.about(AbortSignal.abort()), { name: "AbortError" });
});

test("the last piece of a completion has its confidence; an older server, or null, says nothing", async () => {
  for (const [field, expected] of [[',"confidence":0.25', 0.25], [',"confidence":null', undefined], ["", undefined]] as const) {
    const pieces = await served((_, reply) => reply.end(`data: {"content":"a"}\n\ndata: {"content":"","stop":true${field}}\n\n`),
      client => all(client.complete({ prefix: "", suffix: "" }, { max_tokens: 1 })));
    assert.deepEqual(pieces.map(piece => piece.confidence), [undefined, expected]);
  }
});

test("what became of a suggestion is reported as Tabby's clients do", async () => {
  const sent = await served<any[]>((body, reply, request) => reply.end(void Object.assign(reported, { body, url: request.url })),
    async client => { await client.report("select", "c-1"); return [reported.url, reported.body]; });
  assert.deepEqual(sent, ["/v1/events", { type: "select", completion_id: "c-1", choice_index: 0 }]);
});
const reported: { url?: string; body?: unknown } = {};

test("leaving a stream, or aborting it, closes the connection", async () => {
  for (const way of ["leave", "abort"]) {
    let closed: Promise<unknown>;
    await served((_, reply) => {
      closed = once(reply, "close");
      reply.write('data: {"choices":[{"delta":{"content":"a"}}]}\n\n');
    }, async client => {
      const abort = new AbortController();
      const reading = client.chat([], { max_tokens: 1 }, abort.signal);
      assert.equal((await reading.next()).value.text, "a");
      if (way === "leave") await reading.return(undefined);
      else {
        abort.abort();
        await assert.rejects(reading.next(), { name: "AbortError" });
      }
      await closed;
    });
  }
});

test("health tells a server that answers from one that does not", async () => {
  assert.equal(await served((_, reply) => reply.end("{}"), client => client.healthy()), true);
  assert.equal(await new Client("http://127.0.0.1:9").healthy(), false);
});

import assert from "node:assert/strict";
import { test } from "node:test";
import type { Hole, Piece } from "../src/api.ts";
import { placed, Suggestions } from "../src/suggestions.ts";

const HOLE: Hole = { prefix: "def f():\n    ", suffix: "\n\nf()\n", path: "f.py" };
const typed = (text: string, hole = HOLE): Hole => ({ ...hole, prefix: hole.prefix + text });

/** A model that writes what it is told to, a piece at each call of `write`. */
class Model {
  asked: Hole[] = [];
  aborted = new Set<Hole>();
  private waiting: ((piece: Piece | Error | undefined) => void)[] = [];

  ask = async function* (this: Model, hole: Hole, _: number, signal: AbortSignal): AsyncGenerator<Piece> {
    this.asked.push(hole);
    for (;;) {
      const piece = await new Promise<Piece | Error | undefined>(resolve => {
        this.waiting.push(resolve);
        signal.addEventListener("abort", () => { this.aborted.add(hole); resolve(new Error("aborted")); }, { once: true });
      });
      if (piece instanceof Error) throw piece;
      if (!piece) return;
      yield piece;
    }
  }.bind(this);

  async write(...pieces: (string | Piece | Error | undefined)[]): Promise<void> {
    for (const piece of pieces) {
      await new Promise(setImmediate);
      this.waiting.splice(0).forEach(resolve => resolve(typeof piece === "string" ? { text: piece } : piece));
    }
    await new Promise(setImmediate);
  }
}

test("a suggestion is typed along without asking again, while it is written and after", async () => {
  const model = new Model(), suggestions = new Suggestions(model.ask), one = suggestions.start(HOLE);
  await model.write("return ");
  assert.equal(suggestions.find(typed("ret")), one);
  assert.deepEqual(one.left(typed("ret")), ["urn "]);
  await model.write("1", undefined);
  assert.ok(one.finished);
  assert.deepEqual(suggestions.find(typed("return"))?.left(typed("return")), [" 1"]);
  assert.equal(suggestions.find(typed("return 1")), undefined, "all of it is typed: what comes next is another question");
  assert.equal(suggestions.find(typed("raise")), undefined);
  assert.equal(suggestions.find({ ...HOLE, suffix: "" }), undefined);
  assert.equal(suggestions.find({ ...HOLE, path: "g.py" }), undefined);
  assert.equal(model.asked.length, 1);
});

test("nothing to suggest is remembered too", async () => {
  const model = new Model(), suggestions = new Suggestions(model.ask), one = suggestions.start(HOLE);
  await model.write(undefined);
  assert.equal(suggestions.find(HOLE), one);
  assert.deepEqual(one.left(HOLE), [""]);
});

test("a new question cancels the older ones, whose parts are forgotten", async () => {
  const model = new Model(), suggestions = new Suggestions(model.ask), old = suggestions.start(HOLE);
  await model.write("ret");
  const fresh = suggestions.start(typed("x"));
  await old.done;
  assert.deepEqual([...model.aborted], [HOLE]);
  assert.ok(old.cancelled && !old.finished && old.error === undefined);
  assert.equal(suggestions.find(HOLE), undefined);
  assert.equal(suggestions.find(typed("x")), fresh);
});

test("a suggestion that the server cancelled is not taken for a whole one", async () => {
  const model = new Model(), suggestions = new Suggestions(model.ask), one = suggestions.start(HOLE);
  await model.write({ text: "re", timings: { stop: "cancelled" } as Piece["timings"] }, undefined);
  await one.done;
  assert.ok(!one.finished);
  assert.equal(suggestions.find(HOLE), undefined);
});

test("the next suggestion is there once this one is accepted", async () => {
  const model = new Model(), suggestions = new Suggestions(model.ask), one = suggestions.start(HOLE);
  await model.write("return 1", undefined);
  suggestions.prefetch(one);
  suggestions.prefetch(one);
  await model.write("\n", undefined);
  assert.deepEqual(model.asked.map(hole => hole.prefix), [HOLE.prefix, HOLE.prefix + "return 1"]);
  assert.deepEqual(suggestions.find(typed("return 1"))?.left(typed("return 1")), ["\n"]);
  assert.equal(suggestions.find(HOLE), one, "the first is still shown");
});

test("several are told apart, the same one is told once, and one does not stand for several", async () => {
  const model = new Model(), suggestions = new Suggestions(model.ask);
  const one = suggestions.start(HOLE);
  await model.write("a", undefined);
  assert.equal(suggestions.find(HOLE, 3), undefined);
  const three = suggestions.start(HOLE, 3);
  await model.write({ text: "b", index: 2 }, { text: "a", index: 0 }, { text: "a", index: 1 });
  assert.deepEqual(three.left(HOLE), ["a", "a", "b"]);
  await model.write(undefined);
  assert.deepEqual(three.left(HOLE), ["a", "b"]);
  assert.equal(suggestions.find(HOLE), three);
  assert.ok(one.finished);
});

test("an error is kept with the suggestion, which is asked for anew", async () => {
  const model = new Model(), suggestions = new Suggestions(model.ask), one = suggestions.start(HOLE);
  await model.write(new Error("no server"));
  await one.done;
  await one.begun;
  assert.match(String(one.error), /no server/);
  assert.equal(suggestions.find(HOLE), undefined);
});

test("text of several lines replaces the rest of the line, which ends up behind it", () => {
  assert.deepEqual(placed("a", ");"), { insert: "a", replaced: 0 });
  assert.deepEqual(placed("a,\n  b", ");"), { insert: "a,\n  b);", replaced: 2 });
});

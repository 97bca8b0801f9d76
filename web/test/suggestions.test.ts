import assert from "node:assert/strict";
import { test } from "node:test";
import type { Infill, Piece } from "../src/api.ts";
import { placed, Suggestions } from "../src/suggestions.ts";

const INFILL: Infill = { prefix: "def f():\n    ", suffix: "\n\nf()\n", path: "f.py" };
const typed = (text: string, infill = INFILL): Infill => ({ ...infill, prefix: infill.prefix + text });

/** A model that writes what it is given, a piece at each call of `write`. */
class Model {
  asked: Infill[] = [];
  aborted = new Set<Infill>();
  private waiting: ((piece: Piece | Error | undefined) => void)[] = [];

  ask = async function* (this: Model, infill: Infill, _: number, signal: AbortSignal): AsyncGenerator<Piece> {
    this.asked.push(infill);
    for (;;) {
      const piece = await new Promise<Piece | Error | undefined>(resolve => {
        this.waiting.push(resolve);
        signal.addEventListener("abort", () => { this.aborted.add(infill); resolve(new Error("aborted")); }, { once: true });
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
  const model = new Model(), suggestions = new Suggestions(model.ask), suggestion = suggestions.start(INFILL);
  await model.write("return ");
  assert.equal(suggestions.find(typed("ret")), suggestion);
  assert.deepEqual(suggestion.remaining(typed("ret")), ["urn "]);
  await model.write("1", undefined);
  assert.ok(suggestion.finished);
  assert.deepEqual(suggestions.find(typed("return"))?.remaining(typed("return")), [" 1"]);
  assert.equal(suggestions.find(typed("return 1")), undefined, "all of it is typed: what comes next is another question");
  assert.equal(suggestions.find(typed("raise")), undefined);
  assert.equal(suggestions.find({ ...INFILL, suffix: "" }), undefined);
  assert.equal(suggestions.find({ ...INFILL, path: "g.py" }), undefined);
  assert.equal(model.asked.length, 1);
});

test("nothing to suggest is remembered too", async () => {
  const model = new Model(), suggestions = new Suggestions(model.ask), suggestion = suggestions.start(INFILL);
  await model.write(undefined);
  assert.equal(suggestions.find(INFILL), suggestion);
  assert.deepEqual(suggestion.remaining(INFILL), [""]);
});

test("a new question cancels the older ones, whose parts are forgotten", async () => {
  const model = new Model(), suggestions = new Suggestions(model.ask), old = suggestions.start(INFILL);
  await model.write("ret");
  const fresh = suggestions.start(typed("x"));
  await old.done;
  assert.deepEqual([...model.aborted], [INFILL]);
  assert.ok(old.cancelled && !old.finished && old.error === undefined);
  assert.equal(suggestions.find(INFILL), undefined);
  assert.equal(suggestions.find(typed("x")), fresh);
});

test("a suggestion that the server cancelled is not taken for a whole one", async () => {
  const model = new Model(), suggestions = new Suggestions(model.ask), suggestion = suggestions.start(INFILL);
  await model.write({ text: "re", timings: { stop: "cancelled" } as Piece["timings"] }, undefined);
  await suggestion.done;
  assert.ok(!suggestion.finished);
  assert.equal(suggestions.find(INFILL), undefined);
});

test("the next suggestion is there once this one is accepted", async () => {
  const model = new Model(), suggestions = new Suggestions(model.ask), suggestion = suggestions.start(INFILL);
  await model.write("return 1", undefined);
  suggestions.prefetch(suggestion);
  suggestions.prefetch(suggestion);
  await model.write("\n", undefined);
  assert.deepEqual(model.asked.map(infill => infill.prefix), [INFILL.prefix, INFILL.prefix + "return 1"]);
  assert.deepEqual(suggestions.find(typed("return 1"))?.remaining(typed("return 1")), ["\n"]);
  assert.equal(suggestions.find(INFILL), suggestion, "the first is still shown");
});

test("several are told apart, the same one is told once, and one does not stand for several", async () => {
  const model = new Model(), suggestions = new Suggestions(model.ask);
  const suggestion = suggestions.start(INFILL);
  await model.write("a", undefined);
  assert.equal(suggestions.find(INFILL, 3), undefined);
  const three = suggestions.start(INFILL, 3);
  await model.write({ text: "b", index: 2 }, { text: "a", index: 0 }, { text: "a", index: 1 });
  assert.deepEqual(three.remaining(INFILL), ["a", "a", "b"]);
  await model.write(undefined);
  assert.deepEqual(three.remaining(INFILL), ["a", "b"]);
  assert.equal(suggestions.find(INFILL), three);
  assert.ok(suggestion.finished);
});

test("an error is kept with the suggestion, which is asked for anew", async () => {
  const model = new Model(), suggestions = new Suggestions(model.ask), suggestion = suggestions.start(INFILL);
  await model.write(new Error("no server"));
  await suggestion.done;
  await suggestion.firstText;
  assert.match(String(suggestion.error), /no server/);
  assert.equal(suggestions.find(INFILL), undefined);
});

test("text of several lines replaces the rest of the line, which ends up behind it", () => {
  assert.deepEqual(placed("a", ");"), { insert: "a", replaced: 0 });
  assert.deepEqual(placed("a,\n  b", ");"), { insert: "a,\n  b);", replaced: 2 });
});

test("a suggestion that nobody requested is shown once it is complete, if the model is sure enough of it", async () => {
  const suggestions = new Suggestions(async function* (infill) {
    yield { text: infill.prefix };
    yield { text: "", confidence: 0.25 };
  });
  const unsure = suggestions.start({ prefix: "a", suffix: "" });
  assert.ok(!unsure.visible(0.2) && unsure.visible(0));
  await unsure.done;
  assert.deepEqual([0, 0.25, 0.3, 1].map(least => unsure.visible(least)), [true, true, false, false]);
  unsure.requested = true;
  assert.ok(unsure.visible(1), "who asks gets all");

  const requested = suggestions.start({ prefix: "b", suffix: "" });
  requested.requested = true;
  assert.ok(requested.visible(0.3), "while it is generated, too");
  const silent = new Suggestions(async function* () { yield { text: "x" }; }).start({ prefix: "", suffix: "" });
  await silent.done;
  assert.ok(silent.visible(1), "a server that gives no confidence");
});

test("of several texts the first, the likeliest, decides", async () => {
  const suggestion = new Suggestions(async function* () {
    yield { text: "x", index: 0, confidence: 0.9 };
    yield { text: "y", index: 1, confidence: 0.1 };
  }).start({ prefix: "", suffix: "" }, 2);
  await suggestion.done;
  assert.ok(suggestion.visible(0.5));
});

import assert from "node:assert/strict";
import { type TestContext, test } from "node:test";
import type { Hole, Piece } from "../src/api.ts";
import { GRACE, Outcomes } from "../src/outcomes.ts";
import { type Suggestion, Suggestions } from "../src/suggestions.ts";

const HOLE: Hole = { prefix: "x = ", suffix: "\n" };

/** Outcomes, what they told, and a maker of suggestions that are whole. */
function scene(t: TestContext, answer = Promise.resolve()) {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const told: string[] = [], outcomes = new Outcomes((outcome, id) => { told.push(`${outcome} ${id}`); return answer; });
  const written = async (...pieces: Piece[]): Promise<Suggestion> => {
    const one = new Suggestions(async function* () { yield* pieces; }).start(HOLE, pieces.length);
    await one.done;
    return one;
  };
  const show = async (one: Suggestion): Promise<void> => { outcomes.show(one); await one.done; };
  return { told, outcomes, written, show, later: () => t.mock.timers.tick(GRACE) };
}

test("a suggestion is seen once, however often it is shown, and dismissed when another is", async t => {
  const { told, written, show, later } = scene(t), one = await written({ text: "1", id: "a" });
  await show(one);
  await show(one);
  later();
  assert.deepEqual(told, ["view a"]);
  await show(await written({ text: "2", id: "b" }));
  later();
  assert.deepEqual(told, ["view a", "view b", "dismiss a"]);
});

test("an acceptance that is heard of after the next suggestion is shown is told before the dismissal", async t => {
  const { told, outcomes, written, show, later } = scene(t);
  await show(await written({ text: "1", id: "a" }));
  await show(await written({ text: "2", id: "b" }));
  outcomes.accept("a");
  later();
  assert.deepEqual(told, ["view a", "view b", "select a", "dismiss a"]);
});

test("what was accepted is not dismissed, and the text that was chosen counts", async t => {
  const { told, outcomes, written, show, later } = scene(t);
  const one = await written({ text: "1", index: 0, id: "a" }, { text: "1", index: 1, id: "b" }, { text: "12", index: 2, id: "c" });
  await show(one);
  assert.equal(one.id({ ...HOLE, prefix: "x = 1" }, "2"), "c");
  outcomes.accept(one.id(HOLE, "12"));
  await show(await written({ text: "" }));
  later();
  assert.deepEqual(told, ["view a", "select c"]);
});

test("a text that is still being written is not told of, and a server that cannot be told is no error", async t => {
  const { told, outcomes, written, show } = scene(t, Promise.reject(new Error("no server")));
  outcomes.accept(undefined);
  assert.deepEqual(told, []);
  await show(await written({ text: "1", id: "a" }));
  assert.deepEqual(told, ["view a"]);
});

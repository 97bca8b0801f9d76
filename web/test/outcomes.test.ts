import assert from "node:assert/strict";
import { type TestContext, test } from "node:test";
import type { Infill, Piece } from "../src/api.ts";
import { GRACE_MS, Outcomes } from "../src/outcomes.ts";
import { type Suggestion, Suggestions } from "../src/suggestions.ts";

const INFILL: Infill = { prefix: "x = ", suffix: "\n" };

/** Outcomes, what they reported, and a maker of suggestions that are whole. */
function scene(t: TestContext, answer = Promise.resolve()) {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const reported: string[] = [], outcomes = new Outcomes((outcome, id) => { reported.push(`${outcome} ${id}`); return answer; });
  const written = async (...pieces: Piece[]): Promise<Suggestion> => {
    const suggestion = new Suggestions(async function* () { yield* pieces; }).start(INFILL, pieces.length);
    await suggestion.done;
    return suggestion;
  };
  const show = async (suggestion: Suggestion): Promise<void> => { outcomes.show(suggestion); await suggestion.done; };
  return { reported, outcomes, written, show, later: () => t.mock.timers.tick(GRACE_MS) };
}

test("a suggestion is seen once, however often it is shown, and dismissed when another is", async t => {
  const { reported, written, show, later } = scene(t), suggestion = await written({ text: "1", id: "a" });
  await show(suggestion);
  await show(suggestion);
  later();
  assert.deepEqual(reported, ["view a"]);
  await show(await written({ text: "2", id: "b" }));
  later();
  assert.deepEqual(reported, ["view a", "view b", "dismiss a"]);
});

test("an acceptance that is heard of after the next suggestion is shown is reported before the dismissal", async t => {
  const { reported, outcomes, written, show, later } = scene(t);
  await show(await written({ text: "1", id: "a" }));
  await show(await written({ text: "2", id: "b" }));
  outcomes.accept("a");
  later();
  assert.deepEqual(reported, ["view a", "view b", "select a", "dismiss a"]);
});

test("what was accepted is not dismissed, and the text that was chosen counts", async t => {
  const { reported, outcomes, written, show, later } = scene(t);
  const suggestion = await written({ text: "1", index: 0, id: "a" }, { text: "1", index: 1, id: "b" }, { text: "12", index: 2, id: "c" });
  await show(suggestion);
  assert.equal(suggestion.id({ ...INFILL, prefix: "x = 1" }, "2"), "c");
  outcomes.accept(suggestion.id(INFILL, "12"));
  await show(await written({ text: "" }));
  later();
  assert.deepEqual(reported, ["view a", "select c"]);
});

test("a text that is still being written is not reported of, and a server that cannot be reported is no error", async t => {
  const { reported, outcomes, written, show } = scene(t, Promise.reject(new Error("no server")));
  outcomes.accept(undefined);
  assert.deepEqual(reported, []);
  await show(await written({ text: "1", id: "a" }));
  assert.deepEqual(reported, ["view a"]);
});

import assert from "node:assert/strict";
import { test } from "node:test";
import { allowed, chosen, DEFAULTS, restored } from "../src/settings.ts";

test("an emptied number is the default, and one out of its bounds the nearest within", () => {
  for (const empty of ["", "  ", "abc", null, undefined, NaN]) assert.equal(allowed("max_tokens", empty), DEFAULTS.max_tokens, String(empty));
  for (const [given, expected] of [["0", 1], ["-3", 1], ["5000", 1024], ["12.6", 13], ["1e3", 1000], ["Infinity", 1024], [64, 64]] as const)
    assert.equal(allowed("max_tokens", given), expected, String(given));
  for (const [given, expected] of [["0", 10], ["250", 250], ["1e9", 60_000]] as const) assert.equal(allowed("time_budget_ms", given), expected);
  for (const [given, expected] of [["0", 0], ["0.45", 0.45], ["7", 1], ["-1", 0], ["", 0.5]] as const) assert.equal(allowed("minConfidence", given), expected);
  assert.equal(allowed("path", " "), "words.py");
  assert.equal(allowed("path", "a b.ts"), "a b.ts");
});

test("what was stored is checked, and unknown names are left out", () => {
  assert.deepEqual(restored({ max_tokens: 0, time_budget_ms: null, minConfidence: "x", mode: 7, automatic: "no", path: "", trim: "line", old: 1 }),
    { ...DEFAULTS, max_tokens: 1, trim: "line" });
  for (const damaged of [null, 3, "text", []]) assert.deepEqual(restored(damaged), DEFAULTS);
});

test("only what the user chose is stored", () => {
  assert.deepEqual(chosen(DEFAULTS), {});
  assert.deepEqual(chosen({ ...DEFAULTS, trim: "none", minConfidence: 0 }), { trim: "none", minConfidence: 0 });
  assert.deepEqual(restored(chosen({ ...DEFAULTS, path: "a.go" })), { ...DEFAULTS, path: "a.go" });
});

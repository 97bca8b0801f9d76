/** The text around the cursor that a completion request carries. */

import type { Infill } from "../../../web/src/api.ts";

const BEFORE = 48_000, AFTER = 16_000, STEP = 16_000;  // characters

/** The start moves in steps, so that typing keeps what the server has cached. Only the text that is sent is taken out of `text`. */
export function textAround(text: Pick<string, "slice">, offset: number): Pick<Infill, "prefix" | "suffix"> {
  const start = Math.max(0, Math.ceil((offset - BEFORE) / STEP) * STEP);
  return { prefix: text.slice(start, offset), suffix: text.slice(offset, offset + AFTER) };
}

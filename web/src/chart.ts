/** A plot of the cost of suggestions: how much of the prompt was cached, and how long each suggestion took. */

import type { Timings } from "./api.ts";
import { h } from "./dom.ts";

const WIDTH = 240, HEIGHT = 56;

export function chart(timings: Timings, history: Timings[]): HTMLElement[] {
  const { prompt_n, cache_n, prompt_ms, predicted_n, predicted_ms, mode, adapter } = timings;
  const rows = {
    "From the cache": tokens(cache_n),
    "Read": `${tokens(prompt_n)}, ${duration(prompt_ms)}`,
    "Written": `${tokens(predicted_n)}, ${duration(predicted_ms)}`,
    "Speed": predicted_ms ? `${(predicted_n / predicted_ms * 1000).toFixed(0)} tokens a second` : "–",
    "Order": mode?.toUpperCase() ?? "–", "Adapter": adapter ?? "none",
  };
  const share = cache_n / Math.max(1, cache_n + prompt_n);
  const bar = svg("svg", { viewBox: `0 0 ${WIDTH} 10`, role: "img", "aria-label": `${Math.round(share * 100)}% of the prompt cached` },
    svg("rect", { width: WIDTH, height: 10, rx: 3, class: "read" }), svg("rect", { width: WIDTH * share, height: 10, rx: 3, class: "cached" }));
  return [
    h("p", { className: "caption" }, `Prompt: ${cache_n + prompt_n} tokens, ${Math.round(share * 100)}% from the cache`), bar as any,
    legend({ cached: "from the cache", read: "read" }),
    h("dl", {}, ...Object.entries(rows).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    ...(history.length ? plot(history) : []),
  ];
}

function plot(history: Timings[]): HTMLElement[] {
  const caption = `Time of the last suggestions, up to ${duration(longest(history))}`;
  return [h("p", { className: "caption" }, caption), columns(history) as any, legend({ read: "reading", written: "writing" })];
}

/** What the colours mean, by the class of a mark. */
function legend(names: Record<string, string>): HTMLElement {
  const entries = Object.entries(names).map(([mark, name]) => h("li", {}, svg("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" },
    svg("rect", { width: 10, height: 10, rx: 2, class: mark })) as any, name));
  return h("ul", { className: "legend" }, ...entries);
}

function tokens(count: number): string { return `${count} ${count === 1 ? "token" : "tokens"}`; }

function longest(history: Timings[]): number { return Math.max(1, ...history.map(point => point.prompt_ms + point.predicted_ms)); }

function duration(ms: number): string { return ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(1)} s`; }

function columns(history: Timings[]): SVGElement {
  const most = longest(history), step = WIDTH / 60;
  const bars = history.flatMap((point, index) => {
    const read = point.prompt_ms / most * HEIGHT, written = point.predicted_ms / most * HEIGHT, x = index * step;
    return [svg("rect", { x, y: HEIGHT - read, width: step - 1, height: read, class: "read" }),
            svg("rect", { x, y: HEIGHT - read - written, width: step - 1, height: written, class: "written" })];
  });
  return svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `The longest took ${duration(most)}` }, ...bars);
}

function svg(tag: string, attributes: Record<string, unknown>, ...children: Element[]): SVGElement {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

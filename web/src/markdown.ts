/** Markdown from a model, which is not trusted: no scripts, styles, forms, images or classes of the page. */

import DOMPurify from "dompurify";
import hljs from "highlight.js/lib/core";
import bash from "highlight.js/lib/languages/bash";
import cpp from "highlight.js/lib/languages/cpp";
import csharp from "highlight.js/lib/languages/csharp";
import css from "highlight.js/lib/languages/css";
import diff from "highlight.js/lib/languages/diff";
import go from "highlight.js/lib/languages/go";
import java from "highlight.js/lib/languages/java";
import javascript from "highlight.js/lib/languages/javascript";
import json from "highlight.js/lib/languages/json";
import kotlin from "highlight.js/lib/languages/kotlin";
import python from "highlight.js/lib/languages/python";
import rust from "highlight.js/lib/languages/rust";
import sql from "highlight.js/lib/languages/sql";
import typescript from "highlight.js/lib/languages/typescript";
import xml from "highlight.js/lib/languages/xml";
import yaml from "highlight.js/lib/languages/yaml";
import { Marked } from "marked";
import { button, h } from "./dom.ts";

const LANGUAGES = { bash, cpp, csharp, css, diff, go, java, javascript, json, kotlin, python, rust, sql, typescript, xml, yaml };
for (const [name, language] of Object.entries(LANGUAGES)) hljs.registerLanguage(name, language);

const markdown = new Marked({ renderer: { html: ({ text }) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;") } });  // HTML is shown as text
const TAGS = ("p br hr h1 h2 h3 h4 h5 h6 strong em del code pre blockquote ul ol li a table thead tbody tr th td").split(" ");

/** Renders Markdown as safe nodes. Code is highlighted, with a button to copy it and, if there is `insert`, one to insert it. */
export function rendered(text: string, insert?: (code: string) => void): DocumentFragment {
  const fragment = DOMPurify.sanitize(markdown.parse(text, { async: false }), {
    ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ["href", "class", "start"], ALLOW_DATA_ATTR: false, ALLOW_ARIA_ATTR: false,
    ALLOWED_URI_REGEXP: /^(https?|mailto):/i, RETURN_DOM_FRAGMENT: true,
  });
  for (const element of fragment.querySelectorAll("[class]")) {
    const language = element.matches("pre > code") ? /^language-([\w+#-]+)/.exec(element.className)?.[1] : undefined;
    element.removeAttribute("class");
    if (language) element.setAttribute("data-language", language);
  }
  for (const link of fragment.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  for (const code of fragment.querySelectorAll<HTMLElement>("pre > code")) decorate(code, insert);
  return fragment;
}

function decorate(code: HTMLElement, insert?: (code: string) => void): void {
  const text = code.textContent ?? "", language = code.dataset.language ?? "";
  if (hljs.getLanguage(language)) code.innerHTML = hljs.highlight(text, { language }).value;
  const pre = code.parentElement!;
  pre.tabIndex = 0;
  const figure = h("figure", { className: "code" }, h("figcaption", {}, h("span", {}, language || "code"),
    insert ? button("Insert", () => insert(text)) : null, copyButton(() => text)));
  pre.replaceWith(figure);
  figure.append(pre);
}

export function copyButton(text: () => string): HTMLButtonElement {
  const copy = button("Copy", async () => {
    await navigator.clipboard.writeText(text());
    copy.textContent = "Copied";
    setTimeout(() => copy.textContent = "Copy", 1500);
  });
  return copy;
}

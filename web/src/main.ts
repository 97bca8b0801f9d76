import { Chat, type Conversation } from "./chat.ts";
import { Client, type Options, ServerError } from "./api.ts";
import { CodeEditor } from "./editor.ts";
import { h } from "./dom.ts";
import { Outcomes } from "./outcomes.ts";
import { type Point, picture } from "./picture.ts";
import { Suggestions } from "./suggestions.ts";
import "./page.css";

const DEFAULTS = {
  path: "shapes.py", automatic: true, mode: "auto", adapter: "auto", trim: "block", time_budget_ms: 500, max_tokens: 96,
  theme: "auto", key: "",
};
const settings: typeof DEFAULTS = { ...DEFAULTS, ...stored("settings", {}) };
const element = <T extends HTMLElement = HTMLElement>(id: string): T => document.getElementById(id) as T;
const session = Array.from(crypto.getRandomValues(new Uint32Array(2)), part => part.toString(36)).join("");
const client = (): Client => new Client(location.origin, settings.key);
const history: Point[] = [];

function stored<T>(name: string, fallback: T): T {
  try { return JSON.parse(localStorage.getItem(`codegemma.${name}`)!) ?? fallback; } catch { return fallback; }
}

function store(name: string, value: unknown): void {
  try { localStorage.setItem(`codegemma.${name}`, JSON.stringify(value)); } catch (error) { showState(`not saved: ${error}`); }
}

function showState(text: string): void { element("state").textContent = text; }

const suggestions = new Suggestions((infill, count, signal) => {
  const { mode, adapter, trim, time_budget_ms, max_tokens } = settings;
  return client().complete(infill, { mode, adapter, trim, time_budget_ms, max_tokens, session, n_cmpl: count } as Options, signal);
}, changed => {
  if (changed !== code.shown) return;
  code.refresh();
  if (changed.finished && changed.timings) history.push(changed.timings);
  report();
});
const outcomes = new Outcomes((outcome, id) => client().report(outcome, id));
const code = new CodeEditor(element("editor"), suggestions, outcomes, settings, report);

const chat = new Chat(element("chat"), {
  ask: (messages, signal) => client().chat(messages, { adapter: settings.adapter, max_tokens: 1024 }, signal),
  load: () => stored<Conversation[]>("chats", []),
  save: conversations => store("chats", conversations),
});

/** Shows the state, tokens and times of the current suggestion. */
function report(): void {
  const suggestion = code.shown;
  if (!suggestion) return;
  if (suggestion.error) return showError(suggestion.error);
  showState(!suggestion.finished ? suggestion.texts[0] ? "writing" : "reading" : suggestion.texts[0] ? "ready: Tab accepts" : "nothing to suggest");
  element("numbers").replaceChildren(...suggestion.timings ? picture(suggestion.timings, history.slice(-60)) : []);
}

function showError(error: unknown): void {
  if (error instanceof ServerError && error.status === 401) {
    element("key-row").hidden = false;
    return showState("this server needs a key");
  }
  showState(error instanceof TypeError ? "the server does not answer" : String(error instanceof Error ? error.message : error));
}

async function connect(): Promise<void> {
  try {
    const about = await client().about();
    element("model").textContent = about.title || about.model;
    if (!about.chat) chat.hint(`${about.title} was not tuned to chat: it continues the text. Serve an instruction-tuned model (-m 7b-it).`);
    const names = [["auto", "automatic"], ["none", "base alone"], ...about.adapters.map(name => [name, name])];
    element("adapter").replaceChildren(...names.map(([value, text]) => h("option", { value }, text)));
    if (!names.some(([value]) => value === settings.adapter)) settings.adapter = "auto";
    element<HTMLSelectElement>("adapter").value = settings.adapter;
    showState("ready: type, or press Alt+\\");
  } catch (error) { showError(error); }
}

const dark = matchMedia("(prefers-color-scheme: dark)");

function applyTheme(): void {
  const isDark = settings.theme === "auto" ? dark.matches : settings.theme === "dark";
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  code.theme(isDark);
}

/** Binds a control of the form to the setting that has its id as name. */
function bind(control: HTMLInputElement | HTMLSelectElement): void {
  const name = control.id as keyof typeof settings, box = control instanceof HTMLInputElement && control.type === "checkbox";
  if (box) control.checked = Boolean(settings[name]);
  else control.value = String(settings[name]);
  control.addEventListener("change", () => {
    const value = box ? control.checked : control.type === "number" ? Number(control.value) : control.value;
    Object.assign(settings, { [name]: value });
    store("settings", settings);
    suggestions.clear();
    if (name === "path") code.rename(settings.path);
    if (name === "theme") applyTheme();
    if (name === "key") void connect();
  });
}

function showPage(): void {
  const page = location.hash === "#/chat" ? "chat" : "complete";
  for (const name of ["complete", "chat"]) {
    element(name).hidden = name !== page;
    element(`to-${name}`).setAttribute("aria-current", name === page ? "page" : "false");
  }
  (page === "chat" ? chat : code).focus();
}

document.querySelectorAll<HTMLInputElement>("[data-setting]").forEach(bind);
addEventListener("unhandledrejection", event => { if (event.reason?.name === "Canceled") event.preventDefault(); });  // Monaco cancels by rejecting
addEventListener("submit", event => event.preventDefault());
addEventListener("hashchange", showPage);
dark.addEventListener("change", applyTheme);
applyTheme();
showPage();
void connect();

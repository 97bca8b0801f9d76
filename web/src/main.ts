import { Chat, type Conversation } from "./chat.ts";
import { chatHint, Client, type Options, ServerError, type Timings } from "./api.ts";
import { CodeEditor, type Work } from "./editor.ts";
import { h } from "./dom.ts";
import { Outcomes } from "./outcomes.ts";
import { chart } from "./chart.ts";
import { allowed, chosen, restored, type Settings } from "./settings.ts";
import { Suggestions } from "./suggestions.ts";
import "./page.css";

const KEEP_MS = 300;  // after a change of the text, until it is stored

const settings: Settings = restored(stored("settings", {}));
const element = <T extends HTMLElement = HTMLElement>(id: string): T => document.getElementById(id) as T;
const session = Array.from(crypto.getRandomValues(new Uint32Array(2)), part => part.toString(36)).join("");
const client = (): Client => new Client(location.origin, settings.key);
const history: Timings[] = [];

function stored<T>(name: string, fallback: T): T {
  try { return JSON.parse(localStorage.getItem(`codegemma.${name}`)!) ?? fallback; } catch { return fallback; }
}

function store(name: string, value: unknown): void {
  const key = `codegemma.${name}`;
  try { value === undefined ? localStorage.removeItem(key) : localStorage.setItem(key, JSON.stringify(value)); } catch (error) { showState(`not saved: ${error}`); }
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
let work = stored<Work | undefined>("work", undefined), keeping = 0;
const code = new CodeEditor(element("editor"), suggestions, outcomes, settings, typeof work?.text === "string" ? work : undefined, keep, report);

const chat = new Chat(element("chat"), {
  ask: (messages, signal) => client().chat(messages, { adapter: settings.adapter, max_tokens: 1024 }, signal),
  load: () => stored<Conversation[]>("chats", []),
  save: conversations => store("chats", conversations),
  loadDraft: () => stored("draft", ""),
  saveDraft: text => store("draft", text),
  explain: error => needsKey(error) ? `${askForKey()}: enter it under Complete` : undefined,
});

/** Stores the text soon, so that a reload brings it back. */
function keep(changed: Work | undefined): void {
  work = changed;
  clearTimeout(keeping);
  keeping = window.setTimeout(() => store("work", work), KEEP_MS);
}

/** Whether the page shows buttons in place of the keys. */
function byTouch(): boolean { return element("touch").offsetHeight > 0; }

/** Shows the state, tokens and times of the current suggestion. */
function report(): void {
  const suggestion = code.shown;
  if (!suggestion) return;
  if (suggestion.error) return showError(suggestion.error);
  showState(!suggestion.finished ? suggestion.texts[0] ? "writing" : "reading" : !suggestion.texts[0] ? "nothing to suggest"
    : suggestion.visible(settings.minConfidence) ? `ready: ${byTouch() ? "Accept takes it" : "Tab accepts"}`
    : `unsure, so hidden: ${byTouch() ? "Suggest" : "Alt+\\"} shows it`);
  element("numbers").replaceChildren(...suggestion.timings ? chart(suggestion.timings, history.slice(-60)) : []);
}

function showError(error: unknown): void {
  showState(needsKey(error) ? askForKey() : String(error instanceof Error ? error.message : error));
}

function needsKey(error: unknown): boolean { return error instanceof ServerError && error.status === 401; }

function askForKey(): string {
  element("key-row").hidden = false;
  return "this server needs a key";
}

async function connect(): Promise<void> {
  try {
    const about = await client().about();
    element("model").textContent = element("model").title = about.title || about.model;
    chat.hint(chatHint(about));
    const names = [["auto", "automatic"], ["none", "base alone"], ...about.adapters.map(name => [name, name])];
    element("adapter").replaceChildren(...names.map(([value, text]) => h("option", { value }, text)));
    if (!names.some(([value]) => value === settings.adapter)) settings.adapter = "auto";
    element<HTMLSelectElement>("adapter").value = settings.adapter;
    showState(`ready: type, or ${byTouch() ? "tap Suggest" : "press Alt+\\"}`);
  } catch (error) { showError(error); }
}

const dark = matchMedia("(prefers-color-scheme: dark)");

function applyTheme(): void {
  const isDark = settings.theme === "auto" ? dark.matches : settings.theme === "dark";
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  code.theme(isDark);
}

/** Binds a control of the form to the setting that has its id as name. What is not allowed becomes what is, in the control too. */
function bind(control: HTMLInputElement | HTMLSelectElement): void {
  const name = control.id as keyof Settings, box = control instanceof HTMLInputElement && control.type === "checkbox";
  const show = (): void => {
    if (box) control.checked = Boolean(settings[name]);
    else control.value = String(settings[name]);
  };
  show();
  if (!control.value && name !== "adapter" && name !== "key") {  // a choice that this page does not have
    Object.assign(settings, { [name]: allowed(name, undefined) });
    show();
  }
  control.addEventListener("change", () => {
    Object.assign(settings, { [name]: allowed(name, box ? control.checked : control.value) });
    show();
    store("settings", chosen(settings));
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
document.querySelectorAll<HTMLButtonElement>("[data-command]").forEach(control => {
  control.addEventListener("pointerdown", event => event.preventDefault());  // the editor keeps the focus, and so the suggestion
  control.addEventListener("click", () => code.run(control.dataset.command!));
});
element("example").addEventListener("click", () => code.restart());
addEventListener("pagehide", () => { if (keeping) store("work", work); });
addEventListener("unhandledrejection", event => { if (event.reason?.name === "Canceled") event.preventDefault(); });  // Monaco cancels by rejecting
addEventListener("submit", event => event.preventDefault());
addEventListener("hashchange", showPage);
dark.addEventListener("change", applyTheme);
applyTheme();
showPage();
void connect();

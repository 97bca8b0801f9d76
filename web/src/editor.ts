/** A code editor whose ghost text is shown while the server generates it. */

import type { Infill } from "./api.ts";
import { editor, languages, Range, Uri } from "./monaco.ts";
import type { Outcomes } from "./outcomes.ts";
import type { Settings } from "./settings.ts";
import { placed, type Suggestion, type Suggestions } from "./suggestions.ts";

self.MonacoEnvironment = { getWorker: () => new Worker("editor.worker.js", { type: "module" }) };

const EXPLICIT = languages.InlineCompletionTriggerKind.Explicit;
const ACCEPTED = 0;       // InlineCompletionEndOfLifeReasonKind.Accepted
const VARIANTS = 3;       // suggestions when the user asks by key
const REFRESH_MS = 80;    // between updates of a suggestion that is being generated

/** What a page shows at the first visit, with the cursor in the loop. The default model completes it right (tests/e2e). */
const EXAMPLE = `"""Words of a text."""


def words(text: str) -> list[str]:
    """The words, in lower case."""
    return text.lower().split()


def count(text: str) -> dict[str, int]:
    """How often each word occurs."""
    counts = {}
    for word in words(text):
       \u0020
    return counts


print(count("to be or not to be"))
`;
const IN_THE_LOOP = { lineNumber: 13, column: 9 };

/** A text and the place of the cursor in it, as they are kept for the next visit. */
export interface Work { text: string; lineNumber: number; column: number }

interface Offer extends languages.InlineCompletions<languages.InlineCompletion & { id?: string }> { suggestion?: Suggestion }

export class CodeEditor {
  shown?: Suggestion;
  private monaco: editor.IStandaloneCodeEditor;
  private refreshing = false;
  private refreshTimer = 0;

  /** Begins with `work`, or with the example; `keep` is called with every change of it, `report` when there is something to show. */
  constructor(root: HTMLElement, private suggestions: Suggestions, outcomes: Outcomes, private settings: Settings, work: Work | undefined,
      private keep: (work: Work | undefined) => void, private report: () => void) {
    const narrow = matchMedia("(max-width: 760px)").matches;
    this.monaco = editor.create(root, {
      model: editor.createModel(work?.text ?? EXAMPLE, undefined, Uri.file(settings.path)), automaticLayout: true, minimap: { enabled: false },
      fontSize: 14, wordWrap: narrow ? "on" : "off", scrollBeyondLastLine: false, quickSuggestions: false, padding: { top: 12, bottom: 12 }, tabSize: 4,
      fontFamily: "ui-monospace, 'Cascadia Code', 'DejaVu Sans Mono', Menlo, Consolas, monospace", renderLineHighlight: "none",
      inlineSuggest: { enabled: true, showToolbar: "onHover", minShowDelay: 0 }, ariaLabel: "Code", lineNumbersMinChars: 3,
    });
    this.monaco.setPosition(work ?? IN_THE_LOOP);
    this.monaco.onDidChangeCursorPosition(({ position: { lineNumber, column } }) => {
      const text = this.monaco.getValue();
      this.keep(text === EXAMPLE ? undefined : { text, lineNumber, column });
    });
    this.monaco.addAction({
      id: "codegemma.suggest", label: "Suggest here", keybindings: [512 /* Alt */ | 93 /* \ */],
      run: () => this.trigger(),
    });
    languages.registerInlineCompletionsProvider({ pattern: "**" }, {
      provideInlineCompletions: (model, position, { triggerKind }) => this.provide(model, position, triggerKind === EXPLICIT),
      handleItemDidShow: ({ suggestion }: Offer) => { if (suggestion) outcomes.show(suggestion); },
      handleEndOfLifetime: (_: Offer, { id }: Offer["items"][number], { kind }) => { if (kind === ACCEPTED) outcomes.accept(id); },
      disposeInlineCompletions: () => {}, debounceDelayMs: 0,
    });
  }

  focus(): void { this.monaco.focus(); }

  trigger(): void { this.run("trigger"); }

  /** Runs a command of Monaco's on suggestions: "trigger", "commit", "acceptNextWord", "showNext" or "hide". */
  run(command: string): void {
    this.monaco.focus();
    this.monaco.trigger("page", `editor.action.inlineSuggest.${command}`, {});
  }

  /** Puts the example in place of the text. */
  restart(): void {
    this.monaco.executeEdits("page", [{ range: this.monaco.getModel()!.getFullModelRange(), text: EXAMPLE }]);
    this.monaco.setPosition(IN_THE_LOOP);
    this.monaco.focus();
  }

  /** Shows what has been generated since. Monaco asks again about an unchanged text only if it shows nothing. */
  refresh(): void {
    if (this.refreshTimer || !this.monaco.hasTextFocus() || !this.shown?.visible(this.settings.minConfidence)) return;
    this.refreshTimer = window.setTimeout(() => {
      this.refreshTimer = 0;
      this.refreshing = true;
      this.monaco.trigger("page", "editor.action.inlineSuggest.hide", {});
      this.trigger();
      setTimeout(() => this.refreshing = false);
    }, REFRESH_MS);
  }

  theme(dark: boolean): void { editor.setTheme(dark ? "vs-dark" : "vs"); }

  /** Renames the document; the extension of its name sets the language. */
  rename(path: string): void {
    const old = this.monaco.getModel()!, position = this.monaco.getPosition()!;
    this.monaco.setModel(editor.createModel(old.getValue(), undefined, Uri.file(path)));
    this.monaco.setPosition(position);
    old.dispose();
  }

  private async provide(model: editor.ITextModel, position: { lineNumber: number; column: number }, explicit: boolean): Promise<Offer> {
    if (this.refreshing) explicit = false;
    if (!explicit && !this.settings.automatic) return { items: [] };
    const text = model.getValue(editor.EndOfLinePreference.LF), { path } = this.settings;
    const before = model.getValueInRange(Range.fromPositions({ lineNumber: 1, column: 1 }, position), editor.EndOfLinePreference.LF);
    const infill: Infill = { prefix: before, suffix: text.slice(before.length), path, language: model.getLanguageId() };
    const count = explicit ? VARIANTS : 1;
    const suggestion = this.shown = this.suggestions.find(infill, count) ?? this.suggestions.start(infill, count);
    suggestion.requested ||= explicit;
    const { minConfidence } = this.settings;
    await (suggestion.visible(minConfidence) ? suggestion.firstText : suggestion.done);
    this.report();
    if (!suggestion.visible(minConfidence)) return { items: [] };
    if (suggestion.finished) this.suggestions.prefetch(suggestion);
    const rest = infill.suffix.split("\n", 1)[0];
    const items = (suggestion.remaining(infill) ?? []).filter(Boolean).map(text => {
      const { insert, replaced } = placed(text, rest);
      const range = new Range(position.lineNumber, position.column, position.lineNumber, position.column + replaced);
      return { insertText: insert, range, id: suggestion.id(infill, text) };
    });
    return { items, suggestion };
  }
}

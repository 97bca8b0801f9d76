/** The chat: conversations, streaming, stop, edit, regenerate. The page and VS Code each implement its Host. */

import type { Message, Piece, Timings } from "./api.ts";
import { button, h } from "./dom.ts";
import { copyButton, rendered } from "./markdown.ts";

export interface Conversation { title: string; messages: Message[] }

export interface Host {
  ask(messages: Message[], signal: AbortSignal): AsyncIterable<Piece>;
  load(): Conversation[];
  save(conversations: Conversation[]): void;
  insert?(code: string): void;
  loadDraft?(): string;                          // a question that was not sent yet
  saveDraft?(text: string): void;
  explain?(error: unknown): string | undefined;  // what to say of a failure in place of its message
}

const HINT = "Ask about code: what it does, why it fails, how to test it.";

export class Chat {
  private conversations: Conversation[];
  private current: Conversation;
  private writing?: AbortController;
  private list = h("ul", { className: "conversations", "aria-label": "Conversations" });
  private log = h("div", { className: "log", role: "log", "aria-live": "polite", tabIndex: 0, "aria-label": "Messages" });
  private input = h("textarea", { rows: 3, placeholder: "Ask about code", "aria-label": "Message" });
  private sendButton = button("Send", () => this.sendOrStop(), { className: "primary" });

  constructor(root: HTMLElement, readonly host: Host) {
    this.conversations = host.load();
    this.current = this.conversations[0] ?? newConversation();
    const composer = h("form", { className: "composer", onsubmit: (event: Event) => event.preventDefault() },
      this.input, this.sendButton);
    const fold = h("details", { className: "history", open: !matchMedia("(max-width: 760px)").matches },
      h("summary", {}, "Conversations"), button("New chat", () => this.open(newConversation())), this.list);
    root.append(h("div", { className: "chat" }, fold, h("section", { className: "talk" }, this.log, composer)));
    this.input.value = String(host.loadDraft?.() ?? "");
    this.input.oninput = () => host.saveDraft?.(this.input.value);
    this.input.onkeydown = event => this.key(event);
    root.onkeydown = event => { if (event.key === "Escape") this.stop(); };
    this.hint();
    this.show();
  }

  /** Starts a new conversation with a question. */
  ask(question: string): void {
    this.open(newConversation());
    void this.send(question);
  }

  /** Sets the text that an empty conversation shows. */
  hint(text = HINT): void { this.log.dataset.hint = text; }

  focus(): void { this.input.focus(); }

  private open(conversation: Conversation): void {
    this.stop();
    this.current = conversation;
    this.show();
    this.focus();
  }

  private stop(): void { this.writing?.abort(); }

  private sendOrStop(): void {
    if (this.writing) {
      this.focus();  // a second press would send
      return this.stop();
    }
    const text = this.input.value.trim();
    if (!text) return;
    this.input.value = "";
    this.host.saveDraft?.("");
    void this.send(text);
  }

  private key(event: KeyboardEvent): void {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!this.writing) this.sendOrStop();
    } else if (event.key === "ArrowUp" && !this.input.value) {
      const last = this.current.messages.findLastIndex(message => message.role === "user");
      if (last >= 0) { event.preventDefault(); this.edit(last); }
    }
  }

  private send(text: string): Promise<void> {
    this.current.messages.push({ role: "user", content: text });
    this.current.title ||= text.split("\n")[0].slice(0, 60);
    return this.answer();
  }

  /** Requests an answer to the last message and shows it as it is generated. */
  private async answer(): Promise<void> {
    this.stop();
    const conversation = this.current, writing = this.writing = new AbortController();
    const question = [...conversation.messages], answer: Message = { role: "assistant", content: "" };
    conversation.messages.push(answer);
    this.conversations = [conversation, ...this.conversations.filter(other => other !== conversation)];
    this.show();
    const element = this.log.lastElementChild as HTMLElement;
    let timings: Timings | undefined, failure = "", drawing = false;
    const draw = (): void => {
      drawing = false;
      const follow = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 80;
      element.querySelector(".text")!.replaceChildren(rendered(answer.content, this.host.insert));
      if (follow) this.log.scrollTop = this.log.scrollHeight;
    };
    try {
      for await (const piece of this.host.ask(question, writing.signal)) {
        answer.content += piece.text;
        timings = piece.timings ?? timings;
        if (!drawing) drawing = !!requestAnimationFrame(draw);
      }
    } catch (error) {
      if (!writing.signal.aborted) failure = this.host.explain?.(error) ?? (error instanceof Error ? error.message : String(error));
    }
    if (this.writing === writing) this.writing = undefined;
    if (!answer.content) conversation.messages = conversation.messages.filter(message => message !== answer);
    this.host.save(this.conversations);
    if (this.current !== conversation || this.writing) return;
    this.show();
    this.log.append(h("p", { className: failure ? "failure" : "note" }, failure || costOf(timings, writing.signal.aborted)));
    if (failure) this.log.lastElementChild!.append(" ", button("Try again", () => void this.answer()));
    this.log.scrollTop = this.log.scrollHeight;
  }

  private edit(index: number): void {
    const element = this.log.children[index], old = this.current.messages[index].content;
    const area = h("textarea", { value: old, rows: Math.min(12, old.split("\n").length + 1), "aria-label": "Edit message" });
    const done = (): void => {
      this.current.messages.splice(index);
      void this.send(area.value.trim() || old);
    };
    const leave = (): void => { this.show(); this.focus(); };
    area.onkeydown = event => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); done(); }
      if (event.key === "Escape") { event.stopPropagation(); leave(); }
    };
    element.replaceChildren(area, h("div", { className: "actions" }, button("Send", done), button("Cancel", leave)));
    area.focus();
  }

  private regenerate(index: number): void {
    this.current.messages.splice(index);
    void this.answer();
  }

  private remove(conversation: Conversation): void {
    this.conversations = this.conversations.filter(other => other !== conversation);
    this.host.save(this.conversations);
    if (conversation === this.current) this.open(this.conversations[0] ?? newConversation());
    else this.show();
  }

  private show(): void {
    const focused = document.activeElement;
    this.sendButton.textContent = this.writing ? "Stop" : "Send";
    this.list.replaceChildren(...this.conversations.map(conversation => h("li", {},
      button(conversation.title || "New chat", () => this.open(conversation), { "aria-current": conversation === this.current, title: conversation.title }),
      button("×", () => this.remove(conversation), { "aria-label": `Delete ${conversation.title}` }))));
    this.log.replaceChildren(...this.current.messages.map((message, index) => this.message(message, index)));
    this.log.scrollTop = this.log.scrollHeight;
    if (focused && !focused.isConnected) this.focus();  // on a button that was replaced; keys must still reach the chat
  }

  private message({ role, content }: Message, index: number): HTMLElement {
    const text = h("div", { className: "text" });
    if (role === "assistant") text.append(rendered(content, this.host.insert));
    else text.textContent = content;
    const act = role === "user" ? button("Edit", () => this.edit(index)) : button("Regenerate", () => this.regenerate(index));
    return h("article", { className: `message ${role}`, "aria-label": role === "user" ? "You" : "Model" },
      text, h("div", { className: "actions" }, copyButton(() => content), this.writing ? null : act));
  }
}

function newConversation(): Conversation { return { title: "", messages: [] }; }

function costOf(timings: Timings | undefined, stopped: boolean): string {
  if (stopped) return "Stopped.";
  if (!timings) return "";
  const { prompt_n, cache_n, predicted_n, predicted_ms } = timings;
  const rate = predicted_ms ? `, ${(predicted_n / predicted_ms * 1000).toFixed(0)} a second` : "";
  return `${prompt_n} tokens read, ${cache_n} from the cache, ${predicted_n} written${rate}`;
}

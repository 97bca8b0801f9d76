/** The chat in the web view. Its requests are messages to the extension. */

import type { Piece } from "../../../web/src/api.ts";
import { Chat } from "../../../web/src/chat.ts";
import type { ToExtension, ToView } from "./messages.ts";
import "./webview.css";

declare function acquireVsCodeApi(): { postMessage(message: ToExtension): void };

const extension = acquireVsCodeApi();
const answers = new Map<number, ReadableStreamDefaultController<Piece>>();
let lastId = 0, chat: Chat | undefined;

function ask(messages: Parameters<Chat["host"]["ask"]>[0], signal: AbortSignal): ReadableStream<Piece> {
  const id = ++lastId;
  signal.addEventListener("abort", () => extension.postMessage({ type: "stop", id }));
  return new ReadableStream({ start(controller) {
    answers.set(id, controller);
    extension.postMessage({ type: "ask", id, messages });
  } });
}

addEventListener("message", ({ data }: MessageEvent<ToView>) => {
  if (data.type === "load") {
    document.body.replaceChildren();
    chat = new Chat(document.body, {
      ask, load: () => data.conversations, save: conversations => extension.postMessage({ type: "save", conversations }),
      insert: code => extension.postMessage({ type: "insert", code }),
    });
  } else if (data.type === "question") chat?.ask(data.text);
  else if (data.type === "hint") chat?.hint(data.text);
  else if (data.type === "piece") answers.get(data.id)?.enqueue(data.piece);
  else {
    const answer = answers.get(data.id);
    answers.delete(data.id);
    if (data.error) answer?.error(new Error(data.error));
    else answer?.close();
  }
});
extension.postMessage({ type: "ready" });

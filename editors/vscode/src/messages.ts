/** The messages between the chat's web view and the extension. */

import type { Message, Piece } from "../../../web/src/api.ts";
import type { Conversation } from "../../../web/src/chat.ts";

export type ToExtension =
  | { type: "ready" } | { type: "ask"; id: number; messages: Message[] } | { type: "stop"; id: number }
  | { type: "save"; conversations: Conversation[] } | { type: "insert"; code: string };

export type ToView =
  | { type: "load"; conversations: Conversation[] } | { type: "hint"; text?: string } | { type: "question"; text: string }
  | { type: "piece"; id: number; piece: Piece } | { type: "end"; id: number; error?: string };

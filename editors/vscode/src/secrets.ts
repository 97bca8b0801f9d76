/** Which files are never sent, by their names: the policy of codegemma/safety/secrets.py. */

import { CODE_EXTENSIONS, CODE_LANGUAGES, SECRET_FILES, SECRET_FILES_UNLESS_CODE, SECRET_FOLDERS, TEMPLATE_WORDS } from "./secretNames.ts";

/** `language` is the document's language identifier; it decides for `*.key`, which is source code in some projects. */
export function isSecretName(path: string, language = ""): boolean {
  const folders = path.toLowerCase().split(/[/\\]/), name = folders.pop()!;
  if (folders.some(folder => SECRET_FOLDERS.includes(folder)) || matches(name, SECRET_FILES)) return true;
  const parts = name.split(".").slice(-2), extension = parts.at(-1)!;
  const isRead = extension === "key" ? CODE_LANGUAGES.includes(language)
    : CODE_EXTENSIONS.includes(extension) || parts.some(part => TEMPLATE_WORDS.includes(part));
  return !isRead && matches(name, SECRET_FILES_UNLESS_CODE);
}

/** In a pattern, * stands for any characters. */
function matches(name: string, patterns: string[]): boolean {
  return patterns.some(pattern => new RegExp(`^${pattern.replaceAll(".", "\\.").replaceAll("*", ".*")}$`, "s").test(name));
}

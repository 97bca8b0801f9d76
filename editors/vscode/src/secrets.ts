/** Which files are never sent, by their names: the policy of codegemma/safety/secrets.py. */

import { CODE_EXTENSIONS, CODE_LANGUAGES, SECRET_FILES, SECRET_FILES_UNLESS_CODE, SECRET_FOLDERS } from "./secretNames.ts";

/** `language` is the document's language identifier; it decides for names that may be source code, such as `*.key`. */
export function isSecretName(path: string, language = ""): boolean {
  const folders = path.toLowerCase().split(/[/\\]/), name = folders.pop()!;
  if (folders.some(folder => SECRET_FOLDERS.includes(folder)) || matches(name, SECRET_FILES)) return true;
  const isCode = CODE_EXTENSIONS.includes(name.slice(name.lastIndexOf(".") + 1)) || CODE_LANGUAGES.includes(language);
  return !isCode && matches(name, SECRET_FILES_UNLESS_CODE);
}

/** In a pattern, * stands for any characters. */
function matches(name: string, patterns: string[]): boolean {
  return patterns.some(pattern => new RegExp(`^${pattern.replaceAll(".", "\\.").replaceAll("*", ".*")}$`, "s").test(name));
}

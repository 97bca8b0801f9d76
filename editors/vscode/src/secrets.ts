/** Which files are never sent, by their names: the policy of codegemma/safety/secrets.py. */

import {
  BACKUP_MARKS, CODE_EXTENSIONS, CODE_LANGUAGES, SECRET_FILES, SECRET_FILES_UNLESS_CODE, SECRET_FOLDERS, SECRET_PATHS, TEMPLATE_WORDS,
} from "./secretNames.ts";

/** `language` is the document's language identifier; it decides for `*.key`, which is source code in some projects. */
export function isSecretName(path: string, language = ""): boolean {
  const folders = path.toLowerCase().split(/[/\\]/), name = folders.pop()!.replace(new RegExp(BACKUP_MARKS, "g"), "");
  if (folders.some(folder => SECRET_FOLDERS.includes(folder)) || matches(name, SECRET_FILES)) return true;
  if (matches([...folders.slice(-1), name].join("/"), SECRET_PATHS)) return true;
  const parts = name.split(".").slice(-2), extension = parts.at(-1)!;
  const isRead = extension === "key" ? CODE_LANGUAGES.includes(language)
    : CODE_EXTENSIONS.includes(extension) || parts.some(part => TEMPLATE_WORDS.includes(part));
  return !isRead && matches(name, SECRET_FILES_UNLESS_CODE);
}

/** In a pattern, * stands for any characters. A name matches with its leading dot or without. */
function matches(name: string, patterns: string[]): boolean {
  const forms = [name, name.replace(/^\./, "")];
  return patterns.some(pattern => {
    const whole = new RegExp(`^${pattern.replaceAll(".", "\\.").replaceAll("*", ".*")}$`, "s");
    return forms.some(form => whole.test(form));
  });
}

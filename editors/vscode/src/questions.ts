/** The questions that the commands send to the chat. */

/** A piece of code, and the diagnostics about it. */
export interface Passage { path: string; language: string; code: string; problems: string[] }

const TASKS = {
  explain: "Explain what this code does, step by step, and what to watch out for.",
  fix: "Find what is wrong with this code and fix it. Show the corrected code, then say what was wrong.",
  tests: "Write unit tests for this code, with the usual test framework of its language. Cover the edge cases.",
};

export type Task = keyof typeof TASKS;

/** The question in Markdown. The fence is longer than any in the code. */
export function question(task: Task, { path, language, code, problems }: Passage): string {
  const fence = "`".repeat(Math.max(3, ...[...code.matchAll(/`+/g)].map(([ticks]) => ticks.length + 1)));
  const reports = task === "fix" && problems.length ? `\n\nThe tools report:\n${problems.map(problem => `- ${problem}`).join("\n")}` : "";
  return `${TASKS[task]}${reports}\n\n${path}:\n${fence}${language}\n${code.replace(/\n*$/, "\n")}${fence}`;
}

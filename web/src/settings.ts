/** The page's settings: their defaults, and what a form or an older visit may put in their place. */

export const DEFAULTS = {
  path: "words.py", automatic: true, mode: "auto", adapter: "auto", trim: "auto", time_budget_ms: 500, max_tokens: 96, minConfidence: 0.5,
  theme: "auto", key: "",
};
export type Settings = typeof DEFAULTS;

const BOUNDS: Record<string, [least: number, greatest: number, whole: boolean]> = {
  time_budget_ms: [10, 60_000, true], max_tokens: [1, 1024, true], minConfidence: [0, 1, false],
};

/** The value of a setting, near enough to `value` to be allowed; the default where it says nothing. */
export function allowed<K extends keyof Settings>(name: K, value: unknown): Settings[K] {
  const initial = DEFAULTS[name];
  if (typeof initial === "number") {
    const [least, greatest, whole] = BOUNDS[name], number = typeof value === "string" && !value.trim() ? NaN : Number(value ?? NaN);
    if (Number.isNaN(number)) return initial;
    return Math.min(greatest, Math.max(least, whole ? Math.round(number) : number)) as Settings[K];
  }
  if (typeof value !== typeof initial || (name === "path" && !(value as string).trim())) return initial;
  return value as Settings[K];
}

/** Settings from what was stored, which may be of an older page, or damaged. */
export function restored(stored: unknown): Settings {
  const values = Object(stored) as Record<string, unknown>, names = Object.keys(DEFAULTS) as (keyof Settings)[];
  return Object.fromEntries(names.map(name => [name, name in values ? allowed(name, values[name]) : DEFAULTS[name]])) as Settings;
}

/** What there is to store: the values that are not the defaults, so that a later default reaches those who never chose. */
export function chosen(settings: Settings): Partial<Settings> {
  return Object.fromEntries(Object.entries(settings).filter(([name, value]) => value !== DEFAULTS[name as keyof Settings]));
}

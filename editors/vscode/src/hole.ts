/** What of a document goes into a prompt, and what never does. */

import type { Hole } from "../../../web/src/api.ts";

const BEFORE = 48_000, AFTER = 16_000, STEP = 16_000;  // characters

/** Text around the cursor. The start moves in steps, so that typing keeps what was read in the cache. */
export function around(text: string, offset: number): Pick<Hole, "prefix" | "suffix"> {
  const start = Math.max(0, Math.ceil((offset - BEFORE) / STEP) * STEP);
  return { prefix: text.slice(start, offset), suffix: text.slice(offset, offset + AFTER) };
}

const SECRET = /(^|[\\/])(\.env(\..*)?|.*\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk)|id_(rsa|dsa|ecdsa|ed25519)|\.npmrc|\.pypirc|\.netrc|\.pgpass|\.htpasswd|credentials|secrets?\.(json|ya?ml|toml|ini))$/i;

/** Names of files that hold keys and passwords. */
export function secret(path: string): boolean { return SECRET.test(path) || /[\\/]\.(ssh|gnupg|aws)[\\/]/i.test(path); }

// Which streams are open: one for each of my requests that runs, one for what else is watched.

import { follow } from "./api.js";
import { status } from "./dom.js";
import { take } from "./store.js";

const open = new Map();        // id, or null for all -> AbortController

export function subscribe(id) {
  if (open.has(id)) return;
  const ending = new AbortController();
  open.set(id, ending);
  const heard = (state) => { if (!ending.signal.aborted) status(state); };
  follow(id, { take, heard, signal: ending.signal }).finally(() => {
    if (open.get(id) !== ending) return;
    open.delete(id);
    if (!open.size) status("ready");
  });
}

export function unsubscribe(id) {
  open.get(id)?.abort();
  open.delete(id);
  if (!open.size) status("ready");
}

// Requests of others on the page: one by its id, or all.

import { get } from "./api.js";
import { $, inline, make, tell } from "./dom.js";
import { followMine, load } from "./chat.js";
import { menu } from "./share.js";
import { set, view } from "./state.js";
import { isProbe } from "./sent.js";
import { isOf } from "./store.js";
import { subscribe, unsubscribe } from "./streams.js";
import { addTurn, removeTurn, turns } from "./transcript.js";

const EARLIER = 5;             // requests that are shown when all are watched
const KINDS = ["all", "mine"];
let now = "mine";              // what is followed

export const isPlaced = (trace) => turns.some((turn) => turn.ids.some((id) => isOf(trace, id)));

// A place for a trace that no turn shows, where all are watched.
export function placeFor(trace) {
  if (view.watch !== "all" || isPlaced(trace) || isProbe(trace.requestId)) return;
  const heading = trace.requestId + (trace.choice ? ` · choice ${trace.choice}` : "");
  addTurn({ ids: [trace.internalId], heading, watched: true }, (turn) => [menu(turn)]);
}

export async function followWatched() {
  if (now !== "mine") unsubscribe(now === "all" ? null : now);
  for (const turn of turns.filter((one) => one.watched)) removeTurn(turn, true);
  if (now === "all") followMine();   // they were told among all others
  now = view.watch;
  $("watch").value = KINDS.includes(now) ? now : "id";
  $("watched").hidden = KINDS.includes(now);
  if (now === "mine") return;
  if (now !== "all") {
    $("watched").value = now;
    addTurn({ ids: [now], heading: now, asked: "Nothing was heard of it yet. Waiting…", watched: true }, (turn) => [menu(turn)]);
    subscribe(now);
    return;
  }
  subscribe(null);
  try {
    const { data } = await get("v1/requests");
    const others = data.filter((one) => !isProbe(one.request_id));
    for (const one of others.slice(0, EARLIER).reverse()) await load(one.internal_id);
  } catch (error) { tell(error.message); }
}

async function offer() {
  try {
    const { data } = await get("v1/requests");
    $("recent").replaceChildren(...data.map((one) => make("option", { value: one.request_id }, one.finished ? "" : "runs")));
  } catch { /* the field works without suggestions */ }
}

// Who may read only what it can name has no use for all.
export function offerAll(may) {
  $("watch").options[0].disabled = !may;
  if (!may && view.watch === "all") set({ watch: "mine" });
}

export function listenToWatch() {
  $("watch").append(...[["all", "all requests"], ["mine", "my chat"], ["id", "one request…"]]
    .map(([value, text]) => make("option", { value }, inline(text))));
  $("watch").addEventListener("change", () => {
    if ($("watch").value !== "id") return set({ watch: $("watch").value, token: "" }, true);
    $("watched").hidden = false;
    $("watched").focus();
    return offer();
  });
  $("watched").addEventListener("change", () => {
    const id = $("watched").value.trim();
    if (id) set({ watch: id, token: "" }, true);
  });
}

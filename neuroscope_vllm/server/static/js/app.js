// The page: from what comes in, and what the user does, to what is painted.

import { watchServer } from "./about.js";
import { listenToBar, paintBar, paintScale } from "./bar.js";
import { listenToCard, paintCard } from "./card.js";
import { listenToChat, restore } from "./chat.js";
import { $, make, speak, tell } from "./dom.js";
import { ranked } from "./filters.js";
import { focus, look, onFocus, pinned, pinToken } from "./focus.js";
import { keepStop, onPageKey, onTokenKey, setStop } from "./keys.js";
import { schedule, seldom } from "./paint.js";
import { textOf } from "./rows.js";
import { listenToScroll, toToken } from "./scroll.js";
import { searchAgain, listenToSearch } from "./search.js";
import { layersOf, listenToRows, paintPins, paintRanking, paintToken, repin } from "./side.js";
import { onView, view } from "./state.js";
import { paintChanges } from "./steer.js";
import { changes, listen, tracesOf } from "./store.js";
import { paintStrip, tokenUnder } from "./strip.js";
import { paintTable } from "./table.js";
import { tokenOf } from "./tokens.js";
import { latest, mark, paintTokens, recolour, turns, viewOf } from "./transcript.js";
import { paintTrust } from "./trust.js";
import { followWatched, listenToWatch, placeFor } from "./watch.js";

const SELDOM_MS = 250;         // for lists that change with every token

let paused = false;

// Lists and strip of the request that is looked at.
function paintAround() {
  if (!focus.trace || !viewOf(focus.trace)) Object.assign(focus, { trace: latest(), at: -1, row: -1 });
  paintRanking();
  paintPins();
  paintStrip();
  paintTable();
}
const around = seldom(paintAround, SELDOM_MS);

// What came since the last frame. Paused, it stays in the store, and among the changes.
function paintNews() {
  if (paused) return;
  const news = changes();
  for (const trace of news) placeFor(trace);
  if (paintTokens(news)) schedule(paintNews);
  paintScale();
  follow(news);
  for (const trace of news) if (trace.done) ended(trace);
  keepStop();
  around();
}

// The pinned token, once it is there; else the last one that came.
function follow(news) {
  const pin = pinned(), span = pin && viewOf(pin.trace)?.span(pin.at);
  if (span) {
    const anew = focus.trace !== pin.trace || focus.at !== pin.at;
    look(pin.trace, pin.at);
    if (anew) toToken(span);
  } else if (!view.token) {
    const trace = news.findLast((one) => viewOf(one) && !one.done);
    if (trace?.tokens.length && !$("turns").contains(document.activeElement) && !$("turns").matches(":hover")) {
      const computed = trace.tokens.findLastIndex((_, at) => layersOf(trace).some((layer) => trace.layers.get(layer)?.count[at]));
      if (computed >= 0) look(trace, computed);
    }
  }
}

function ended(trace) {
  const best = ranked(trace, layersOf(trace), 3).map((one) => textOf(one.layer, one.index));
  speak(`Answer of ${trace.tokens.length - trace.prompt} tokens ended. Features: ${best.join(", ")}.`);
  for (const turn of turns) if (turn.ids.length > 1 && turn.ids.some((id) => tracesOf(id).includes(trace))) paintChanges(turn);
}

function refresh() {
  recolour();
  paintScale();
  paintToken();
  paintRanking(true);
  paintPins();
  paintStrip();
  paintTable();
}

function onChange(changed, navigated) {
  const has = (...names) => names.some((name) => changed.has(name));
  schedule(paintBar);
  if (navigated && has("turn")) restore();
  if (has("watch")) followWatched();
  if (has("card")) paintCard();
  if (navigated && has("find")) searchAgain();
  if (has("layer", "dense", "special", "colour", "table")) schedule(refresh);
  if (has("sort", "pin")) schedule(() => { paintRanking(true); paintPins(); paintStrip(); repin(); });
  if (has("turn")) around();
  if (has("token")) schedule(() => { follow([]); paintToken(); });
}

function listenToTokens() {
  const pane = $("turns");
  const at = (event, act) => { const token = tokenOf(event.target); if (token) act(token.view.trace, token.at, event.target); };
  pane.addEventListener("pointerover", (event) => at(event, (trace, i) => { if (!view.token) look(trace, i); }));
  pane.addEventListener("focusin", (event) => at(event, (trace, i) => look(trace, i)));
  pane.addEventListener("click", (event) => at(event, (trace, i, span) => { pinToken(trace, i); setStop(span); span.focus(); }));
  pane.addEventListener("keydown", onTokenKey);
  const canvas = $("strip-canvas");
  canvas.addEventListener("pointermove", (event) => {
    const found = tokenUnder(event);
    if (found !== null && !view.token) look(focus.trace, found);
  });
  canvas.addEventListener("click", (event) => {
    const found = tokenUnder(event);
    if (found === null) return;
    pinToken(focus.trace, found);
    toToken(viewOf(focus.trace)?.span(found));
  });
}

function start() {
  onFocus(() => { schedule(paintToken); schedule(keepStop); around(); }, () => schedule(mark));
  listen(() => schedule(paintNews), (text) => $("notices").append(make("p", { class: "remark" }, text)));
  onView(onChange);
  listenToBar((on) => { paused = on; if (!on) schedule(paintNews); });
  listenToCard();
  listenToChat();
  listenToScroll();
  listenToSearch();
  listenToTokens();
  listenToWatch();
  for (const root of [$("card"), document.querySelector("aside"), $("strip-names"), $("turns")]) listenToRows(root);
  addEventListener("keydown", onPageKey);
  addEventListener("resize", () => schedule(paintStrip));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => schedule(paintStrip));
  paintBar();
  tell("ready");
  restore();
  followWatched();
  searchAgain();
  let known = "";
  watchServer(() => {
    schedule(paintTrust);
    schedule(paintBar);
    const now = JSON.stringify([...layersOf({ layers: new Map() })]);
    if (now !== known) { known = now; schedule(refresh); paintCard(); }
  }, (error) => tell(`the side process does not answer (${error.message})`));
}

start();

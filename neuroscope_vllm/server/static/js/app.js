// The page: from what comes in, and what the user does, to what is painted.

import { about, watchServer } from "./about.js";
import { listenToBar, paintBar, paintPause, paintScale } from "./bar.js";
import { listenToCard, paintCard } from "./card.js";
import { catchUp, listenToChat, restore } from "./chat.js";
import { $, make, speak, status, tell } from "./dom.js";
import { ranked } from "./filters.js";
import { focus, look, onFocus, pinned, pinToken } from "./focus.js";
import { paintGuide } from "./guide.js";
import { keepStop, onPageKey, onTokenKey, setStop } from "./keys.js";
import { schedule, seldom } from "./paint.js";
import { textOf } from "./rows.js";
import { listenToScroll, toToken } from "./scroll.js";
import { searchAgain, listenToSearch } from "./search.js";
import { layersOf, listenToRows, paintPins, paintRanking, paintToken, repin } from "./side.js";
import { isProbe } from "./sent.js";
import { listenToSign, paintSign } from "./sign.js";
import { listenToMenus } from "./share.js";
import { onView, set, view } from "./state.js";
import { paintChanges } from "./steer.js";
import { lookUp } from "./names.js";
import { changes, forget, listen, pending, tracesOf } from "./store.js";
import { listenToStrip, paintStrip, tokenUnder } from "./strip.js";
import { paintTable } from "./table.js";
import { tokenOf } from "./tokens.js";
import { KEPT, latest, mark, paintTokens, recolour, turns, viewOf } from "./transcript.js";
import { paintTrust } from "./trust.js";
import { followWatched, isPlaced, listenToWatch, offerAll, placeFor } from "./watch.js";

const SELDOM_MS = 250;         // for lists that change with every token
const CATCH_UP_MS = 5_000;
const NOTICES = 5;

let paused = false, left = 0;   // requests that had to leave while it was paused

// Lists and strip of the request that is looked at.
function paintAround() {
  if (!focus.trace || !viewOf(focus.trace)) Object.assign(focus, { trace: latest(), at: -1, row: -1 });
  paintRanking();
  paintPins();
  paintStrip();
  paintTable(false);
}
const around = seldom(paintAround, SELDOM_MS);

function pause(on) {
  paused = on;
  if (on) return;
  if (left) onGap(`${left} requests that came while the page was paused are not shown: it shows ${KEPT}`, false);
  left = 0;
  schedule(paintNews);
}

// Paused, news stay in the store, and among the changes.
function keepNews() {
  const unseen = view.watch === "all" ? pending().filter((trace) => !isPlaced(trace) && !isProbe(trace.requestId)) : [];
  const most = unseen.filter((trace) => trace.done).slice(0, Math.max(0, unseen.length - KEPT));
  for (const trace of most) forget(trace);
  left += most.length;
  paintPause(true, unseen.length - most.length);
}

// What came since the last frame.
function paintNews() {
  if (paused) return keepNews();
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
  if (has("watch")) {
    followWatched();
    schedule(() => { paintAround(); paintToken(); });
  }
  if (has("card")) paintCard();
  if (navigated && has("find", "by")) searchAgain();
  if (has("layer", "dense", "special", "colour", "table", "strip")) schedule(refresh);
  if (has("sort", "pin")) schedule(() => { paintToken(); paintRanking(true); paintPins(); paintStrip(); repin(); });
  if (has("turn")) around();
  if (has("token")) schedule(() => { follow([]); paintToken(); keepStop(); });
  if (has("pin", "colour")) callByName();
}

// Features of the URL that no token has told of yet.
const callByName = () => lookUp([...view.pin, view.colour].filter(Boolean), () => schedule(() => { refresh(); paintBar(); }));

function listenToTokens() {
  const pane = $("turns");
  const at = (event, act) => { const token = tokenOf(event.target); if (token) act(token.view.trace, token.at, event.target); };
  pane.addEventListener("pointerover", (event) => at(event, (trace, i) => { if (!view.token) look(trace, i); }));
  pane.addEventListener("focusin", (event) => at(event, (trace, i) => { if (!view.token) look(trace, i); }));
  $("unpin").addEventListener("click", () => set({ token: "" }));
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

const afterGap = seldom(catchUp, CATCH_UP_MS);

function onGap(text, lost) {
  $("notices").append(make("p", { class: "remark" }, text));
  if ($("notices").childElementCount > NOTICES) $("notices").firstChild.remove();
  if (lost) afterGap();
}

function start() {
  onFocus(() => { schedule(paintToken); schedule(keepStop); around(); }, () => schedule(mark));
  listen(() => schedule(paintNews), onGap);
  onView(onChange);
  listenToBar(pause);
  listenToCard();
  listenToChat();
  listenToMenus();
  listenToScroll();
  listenToSearch();
  listenToSign();
  listenToStrip();
  listenToTokens();
  listenToWatch();
  for (const root of [$("card"), document.querySelector("aside"), $("strip-names"), $("turns")]) listenToRows(root);
  addEventListener("keydown", onPageKey);
  paintBar();
  status("ready");
  restore();
  followWatched();
  callByName();
  let known = "";
  watchServer(() => {
    schedule(paintTrust);
    schedule(paintGuide);
    schedule(paintBar);
    paintSign(about.access.session);
    offerAll(about.access.lists);
    const now = JSON.stringify([...layersOf({ layers: new Map() })]);
    if (now !== known) { known = now; schedule(refresh); paintCard(); searchAgain(); }
  }, (error) => tell(`the side process does not answer (${error.message})`));
}

start();

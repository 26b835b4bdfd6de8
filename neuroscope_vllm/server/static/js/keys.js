// The keyboard: one token of the page takes the focus (a roving tab stop), arrows go on from there.

import { inline, speak } from "./dom.js";
import { features } from "./filters.js";
import { focus, look, lookAtFeature, pinFeature, pinToken, tokenName } from "./focus.js";
import { keyOf, known } from "./names.js";
import { textOf } from "./rows.js";
import { layersOf, tokenRows } from "./side.js";
import { set, view } from "./state.js";
import { tokenOf } from "./tokens.js";
import { allViews, viewOf } from "./transcript.js";

let stop = null;         // the span that is the tab stop

const BLANKS = { "": "part of a character", "\n": "newline", " ": "space", "\t": "tab" };
const spoken = (text) => text.trim() ? inline(text) : BLANKS[text] ?? "blanks";

// Only the tab stop is a button to screen readers; the others are the text they are.
export function setStop(span, looked = true) {
  if (stop !== span && stop) {
    for (const name of ["tabindex", "role", "aria-label", "aria-pressed"]) stop.removeAttribute(name);
    stop.classList.remove("on");
  }
  stop = span;
  if (!span) return;
  const { view: { trace }, at } = tokenOf(span);
  span.tabIndex = 0;
  span.setAttribute("role", "button");
  span.setAttribute("aria-label", spoken(trace.tokens[at].text));
  span.setAttribute("aria-pressed", view.token === tokenName(trace, at));
  span.classList.toggle("on", looked);
}

// There is always one, so that Tab finds the text; the pointer never takes the focus away.
export function keepStop() {
  if (stop?.isConnected && stop === document.activeElement) return setStop(stop);
  const now = focus.trace && focus.at >= 0 ? viewOf(focus.trace)?.span(focus.at) : null;
  if (now) setStop(now);
  else if (!stop?.isConnected) setStop(allViews().at(-1)?.spans[0] ?? null, false);
}

function go(tokens, at) {
  const span = tokens.span(Math.max(tokens.from, Math.min(at, tokens.from + tokens.spans.length - 1)));
  if (!span) return;
  const { trace } = tokens;
  if (view.token) set({ token: tokenName(trace, span.at) });   // a pin goes along
  look(trace, span.at);
  setStop(span);
  span.focus({ preventScroll: false });
  const [best] = layersOf(trace).flatMap((layer) => features(trace, layer, span.at).slice(0, 1).map((one) => [layer, one.index]));
  speak(`${spoken(trace.tokens[span.at].text)}: ${best ? textOf(...best) : "no features"}`);
}

function chooseRow(step) {
  const rows = tokenRows();
  if (!rows.length) return;
  rows[focus.row]?.classList.remove("chosen");
  focus.row = (Math.max(focus.row, step < 0 ? 0 : -1) + step + rows.length) % rows.length;
  const row = rows[focus.row];
  row.classList.add("chosen");
  row.scrollIntoView({ block: "nearest" });
  lookAtFeature(row.feature);
  speak(`${inline(known(...row.feature)?.label ?? "unlabelled")}, feature ${row.feature[1]}, layer ${row.feature[0]}`);
}

function escape() {
  if (focus.row >= 0) {
    tokenRows()[focus.row]?.classList.remove("chosen");
    focus.row = -1;
    lookAtFeature(null);
  } else if (view.token) set({ token: "" });
  else set({ colour: "" });
}

export function onTokenKey(event) {
  const token = tokenOf(event.target);
  if (!token || event.ctrlKey || event.metaKey || event.altKey) return;
  const { view: tokens, at } = token, views = allViews(), last = tokens.from + tokens.spans.length - 1;
  const other = (step) => views[views.indexOf(tokens) + step];
  const actions = {
    ArrowRight: () => at === last && other(1) ? go(other(1), 0) : go(tokens, at + 1),
    ArrowLeft: () => at === tokens.from && other(-1) ? go(other(-1), Infinity) : go(tokens, at - 1),
    Home: () => go(tokens, tokens.from),
    End: () => go(tokens, last),
    ArrowDown: () => chooseRow(1),
    ArrowUp: () => chooseRow(-1),
    Enter: () => focus.row >= 0 ? pinFeature(keyOf(...tokenRows()[focus.row].feature)) : pinToken(tokens.trace, at),
    Escape: escape,
    c: () => { const row = tokenRows()[Math.max(focus.row, 0)]; if (row) set({ card: keyOf(...row.feature) }, true); },
  };
  actions[" "] = actions.Enter;
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
}

// "/" goes to the search from wherever no text is typed.
export function onPageKey(event) {
  if (event.key !== "/" || event.target.closest("input, textarea, select, dialog") || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  document.getElementById("query").focus();
}

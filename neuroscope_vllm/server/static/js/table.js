// The tokens as a table, for screen readers and for reading numbers.

import { $, inline, make, number } from "./dom.js";
import { features } from "./filters.js";
import { focus } from "./focus.js";
import { layersOf } from "./side.js";
import { known } from "./names.js";
import { view } from "./state.js";

const ROWS = 200, FEATURES = 3;
let page = 0, of = null;

// Live, but never while somebody reads in it.
export function paintTable(now = true) {
  const shown = view.table !== "", { trace } = focus;
  $("table").hidden = !shown;
  $("turns").hidden = shown;
  $("as-table").setAttribute("aria-pressed", shown);
  if (!shown || !now && $("table").contains(document.activeElement)) return;
  if (!trace) { $("table").replaceChildren(make("p", {}, "No request yet.")); return; }
  if (of !== trace) { of = trace; page = focus.at < 0 ? 0 : Math.floor(focus.at / ROWS); }
  const layers = layersOf(trace), from = page * ROWS, to = Math.min(from + ROWS, trace.tokens.length);
  const table = make("table", {},
    make("caption", {}, `Tokens ${from} to ${to - 1} of ${trace.tokens.length} of ${inline(trace.requestId)}`),
    make("thead", {}, make("tr", {}, ...["position", "token", "layer", "L0", "strongest features"].map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", {}, ...Array.from({ length: to - from }, (_, i) => layers.map((layer) => line(trace, layer, from + i))).flat()));
  const turn = (step, text, possible) => make("button", { type: "button", disabled: !possible, onclick: () => { page += step; paintTable(); $("table").firstChild.focus(); } }, text);
  const pane = make("div", { tabindex: 0, role: "region", "aria-label": "table of tokens" }, table);
  $("table").replaceChildren(pane, turn(-1, "Earlier", page > 0), turn(1, "Later", to < trace.tokens.length));
}

function line(trace, layer, at) {
  const data = trace.layers.get(layer), l0 = data?.l0[at] ?? -1, token = trace.tokens[at];
  const best = features(trace, layer, at).slice(0, FEATURES).map((one) =>
    `${inline(known(layer, one.index)?.label?.slice(0, 80) ?? "unlabelled")} [${one.index}] ${number(one.activation)}`);
  return make("tr", { class: token.prompt ? "prompt" : null },
    make("td", {}, String(trace.first + at)), make("th", { scope: "row" }, make("bdi", {}, token.text.trim() ? inline(token.text) : JSON.stringify(inline(token.text)))), make("td", {}, String(layer)),
    make("td", {}, l0 < 0 ? "–" : String(l0)), make("td", {}, best.join("; ") || data?.lack(at) || "–"));
}

// The side pane: features of the token that is looked at, of the whole request, and pinned ones.

import { about, shown } from "./about.js";
import { $, inline, make, number, say } from "./dom.js";
import { answered, counted, features, ranked, sums } from "./filters.js";
import { focus, lookAtFeature, pinFeature, tokenName } from "./focus.js";
import { featureRow, strength } from "./rows.js";
import { keyOf, partsOf } from "./names.js";
import { set, view } from "./state.js";

const LISTED = 50;

export const layersOf = (trace) => shown([...trace.layers.keys()]);

// What the arrow keys go through: the features of the token, layer after layer.
export const tokenRows = () => [...$("token-features").querySelectorAll(".row")];

export function paintToken() {
  const { trace, at } = focus, token = trace?.tokens[at];
  if (!token) {
    say($("which"), "Point at a token to see its features.");
    $("token-features").replaceChildren();
    $("unpin").hidden = true;
    return;
  }
  const pinned = view.token === tokenName(trace, at);
  $("unpin").hidden = !pinned;
  say($("which"), `${JSON.stringify(inline(token.text))} at ${trace.first + at}, token ${token.id}${pinned ? " (pinned)" : ""}`);
  $("token-features").replaceChildren(...layersOf(trace).map((layer) => oneLayer(trace, layer, at)));
  const rows = tokenRows();
  rows[focus.row]?.classList.add("chosen");
}

function oneLayer(trace, layer, at) {
  const data = trace.layers.get(layer), found = inOrder(features(trace, layer, at), sums(trace, layer));
  const hidden = (data?.count[at] ?? 0) - found.length;
  const most = Math.max(...found.map((one) => one.activation), 0), l0 = data?.l0[at] ?? -1;
  const steered = (data?.steered.get(at) ?? []).map(({ index, before, after }) =>
    make("p", { class: "remark" }, `feature ${index} steered: ${number(before)} → ${number(after)}`));
  const rows = found.map((one) => featureRow(layer, one.index, { numbers: strength(one), share: one.activation / most }));
  return make("section", { class: "layer", "aria-label": `layer ${layer}` },
    make("h3", {}, `layer ${layer} · L0 ${l0 < 0 ? "–" : l0}`), ...steered,
    found.length ? make("ol", {}, ...rows) : make("p", { class: "quiet" }, lack(trace, data, at)),
    found.length && hidden ? make("p", { class: "quiet" }, `and ${hidden} dense (hidden: see the filters)`) : null);
}

// As the lists are sorted; by frequency: how often each is on top in this request.
function inOrder(found, counts) {
  const of = { activation: (one) => one.activation, frequency: (one) => counts.get(one.index)?.count ?? 0 }[view.sort];
  return of ? found.sort((a, b) => of(b) - of(a)) : found;
}

function lack(trace, data, at) {
  if (!data) return "not observed at this layer";
  if (data.count[at] && about.special.has(trace.tokens[at].id)) return "a special token (hidden: see the filters)";
  return data.lack(at) || "only dense features (hidden: see the filters)";
}

// Lists under the pointer or with the focus stay as they are, so that nobody clicks what just moved.
const held = (list) => list.matches(":hover") || list.contains(document.activeElement);

export function paintRanking(now = false) {
  const list = $("ranked"), { trace } = focus;
  if (!now && held(list)) return;
  $("sort").value = view.sort;
  if (!trace) { list.replaceChildren(); return; }
  const found = ranked(trace, layersOf(trace), LISTED), tokens = counted(trace);
  say($("ranking-of"), `Features of this ${answered(trace) ? "answer" : "prompt"}`);
  const of = { surprise: "score", activation: "activation", frequency: "count" }[view.sort] ?? "score";
  const most = Math.max(...found.map((one) => one[of]), 0);
  refill(list, found.map((one) => featureRow(one.layer, one.index, {
    numbers: `${strength(one)} · on ${one.count} of ${tokens}`, share: one[of] / most,
  })));
}

export function paintPins() {
  const list = $("pins").querySelector("ol"), { trace } = focus;
  $("pins").hidden = !view.pin.length;
  refill(list, view.pin.map((key) => {
    const [layer, index] = partsOf(key);
    const sum = trace && sums(trace, layer).get(index);
    return featureRow(layer, index, {
      numbers: sum ? `${strength(sum)} · on ${sum.count} of ${counted(trace)}` : `not on top in this ${trace && answered(trace) ? "answer" : "prompt"}`,
    });
  }));
}

// New rows, and the focus where it was.
function refill(list, rows) {
  const active = list.contains(document.activeElement) ? document.activeElement : null;
  const key = active && String(active.closest("li").feature), kind = active?.className;
  list.replaceChildren(...rows);
  if (key) rows.find((row) => String(row.feature) === key)?.querySelector(`.${kind}`)?.focus();
}

export function repin() {
  for (const row of document.querySelectorAll("aside .row, #card .row")) {
    row.querySelector(".feature").setAttribute("aria-pressed", view.pin.includes(keyOf(...row.feature)));
  }
}

// Pointing at a feature anywhere shows its tokens; a click pins it, another button opens its card.
export function listenToRows(root) {
  const at = (event) => event.target.closest?.(".row")?.feature ?? null;
  for (const name of ["pointerover", "focusin"]) root.addEventListener(name, (event) => lookAtFeature(at(event)));
  for (const name of ["pointerleave", "focusout"]) root.addEventListener(name, () => lookAtFeature(null));
  root.addEventListener("click", (event) => {
    const feature = at(event);
    if (!feature) return;
    if (event.target.closest(".open")) set({ card: keyOf(...feature) }, true);
    else if (event.target.closest(".feature")) pinFeature(keyOf(...feature));
  });
}

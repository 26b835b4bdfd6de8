// A feature in a list: its name, its numbers, and the way to its card.

import { about } from "./about.js";
import { inline, make, number } from "./dom.js";
import { focus } from "./focus.js";
import { keyOf, known as knownOf } from "./names.js";
import { view } from "./state.js";

const DOUBT = "unreliable: this label scored little better than chance";

// `known`: {label, unreliable} where the caller knows better than what the stream told.
export function nameOf(layer, index, known = knownOf(layer, index)) {
  const node = make("span", { class: known?.unreliable ? "label doubt" : "label", dir: "auto" });
  if (known?.label) node.append(inline(known.label));
  else node.append(make("i", {}, "unlabelled"));
  if (known?.unreliable) { node.append(" ?"); node.title = DOUBT; }
  return node;
}

export function textOf(layer, index) {
  const label = knownOf(layer, index)?.label;
  const short = label && (label.length > 60 ? label.slice(0, 59) + "…" : label);
  return (short ? `${inline(short)} ` : "") + `[${about.sites.length > 1 ? `${layer}:` : ""}${index}]`;
}

// `share`: length of the bar, 0 to 1; `numbers`: what stands below the name.
export function featureRow(layer, index, { numbers, share = null, known, chosen = false }) {
  const key = keyOf(layer, index);
  const bar = make("span", { class: "bar", "aria-hidden": "true" });
  if (share !== null) bar.style.setProperty("--share", Math.min(1, Math.max(0, share)).toFixed(3));
  const where = about.sites.length > 1 ? `layer ${layer} · ` : "";
  const row = make("li", { class: chosen ? "row chosen" : "row" },
    make("button", { type: "button", class: "feature", "aria-pressed": view.pin.includes(key) },
      nameOf(layer, index, known), make("small", {}, `${where}feature ${index} · ${numbers}`), share === null ? null : bar),
    make("button", { type: "button", class: "open", "aria-label": `card of feature ${index}` }, "Card"));
  row.feature = [layer, index];
  if (focus.feature && String(focus.feature) === String(row.feature)) row.classList.add("hit");
  return row;
}

export const strength = ({ activation, score }) => `activation ${number(activation)} · score ${number(score)}`;

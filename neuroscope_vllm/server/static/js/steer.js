// Steering from a card: the same message answered with and without, side by side.

import { about } from "./about.js";
import { ask, lastMessages, user } from "./chat.js";
import { $, make, number } from "./dom.js";
import { features } from "./filters.js";
import { nameOf } from "./rows.js";
import { layersOf } from "./side.js";
import { keyOf, partsOf } from "./names.js";
import { tracesOf } from "./store.js";

const CHANGES = 8;

export function steerForm(card) {
  const unit = card.max ? "max" : "raw";
  const [from, to, step, usual] = unit === "max" ? [-5, 5, 0.25, 1] : [-200, 200, 5, 40];
  const messages = lastMessages();
  const op = make("select", { "aria-label": "how" }, ...["add", "clamp", "scale", "ablate"].map((name) => make("option", {}, name)));
  const slider = make("input", { type: "range", min: from, max: to, step, value: usual, "aria-label": "strength" });
  const value = make("output", {}), text = make("textarea", { rows: 2, required: true, "aria-label": "message to answer twice" });
  text.value = messages.at(-1).content;
  const tell = () => {
    slider.disabled = op.value === "ablate";
    const times = op.value === "scale" || unit === "max";
    value.textContent = slider.disabled ? "to 0" : `${slider.value}${times ? op.value === "scale" ? " × its activation" : ` × its largest (${number(card.max)})` : ""}`;
  };
  op.addEventListener("change", tell);
  slider.addEventListener("input", tell);
  tell();
  const form = make("form", { class: "steer" }, make("h3", {}, "Steer"), make("p", {}, op, " ", slider, " ", value), text, make("button", {}, "Answer with and without"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const edit = { op: op.value, layer: card.layer, feature: card.index };
    if (edit.op !== "ablate") edit.value = Number(slider.value);
    if (unit === "max" && ["add", "clamp"].includes(edit.op)) edit.unit = "max";
    $("card").close();
    const asked = { messages: [...messages.slice(0, -1), user(text.value)], temperature: 0 };
    ask([asked, { ...asked, vllm_xargs: { neuroscope: JSON.stringify({ steer: [edit] }) } }],
      ["without", `${edit.op} feature ${card.index}${slider.disabled ? "" : `: ${value.textContent}`}`]);
  });
  return form;
}

// Where two answers part, and which features rose and fell: mean activation over the tokens of each.
export function paintChanges(turn) {
  const [a, b] = turn.ids.map((id) => tracesOf(id)[0]);
  if (!a?.done || !b?.done || turn.changes.childElementCount) return;
  const before = means(a), after = means(b), found = [];
  for (const key of new Set([...before.keys(), ...after.keys()])) {
    found.push({ key, change: (after.get(key) ?? 0) - (before.get(key) ?? 0) });
  }
  found.sort((x, y) => Math.abs(y.change) - Math.abs(x.change));
  const shown = found.slice(0, CHANGES), most = Math.abs(shown[0]?.change ?? 0);
  const parted = a.shared(b), from = parted - a.prompt;
  turn.changes.append(make("h3", {}, from < 0 || parted === Math.min(a.tokens.length, b.tokens.length)
    ? "Both answers are alike" : `The answers part at token ${from}`), make("ol", {}, ...shown.map(({ key, change }) => {
    const [layer, index] = partsOf(key), bar = make("span", { class: change < 0 ? "bar down" : "bar up", "aria-hidden": "true" });
    bar.style.setProperty("--share", (Math.abs(change) / most).toFixed(3));
    const row = make("li", { class: "row" }, make("button", { type: "button", class: "feature" }, nameOf(layer, index),
      make("small", {}, `${about.sites.length > 1 ? `layer ${layer} · ` : ""}feature ${index} · mean ${change < 0 ? "−" : "+"}${number(Math.abs(change))}`), bar));
    row.feature = [layer, index];
    return row;
  })));
}

function means(trace) {
  const found = new Map(), tokens = Math.max(1, trace.tokens.length - trace.prompt);
  for (let at = trace.prompt; at < trace.tokens.length; at++) {
    for (const layer of layersOf(trace)) for (const { index, activation } of features(trace, layer, at)) {
      const key = keyOf(layer, index);
      found.set(key, (found.get(key) ?? 0) + activation / tokens);
    }
  }
  return found;
}

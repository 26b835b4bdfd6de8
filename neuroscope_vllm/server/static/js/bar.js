// The bar on top: layer, colour, filters, pause, table.

import { layers } from "./about.js";
import { top } from "./colour.js";
import { $, make, number, say } from "./dom.js";
import { textOf } from "./rows.js";
import { partsOf } from "./names.js";
import { set, view } from "./state.js";

const KEYS = [["← →", "token"], ["↑ ↓", "feature of the token"], ["Enter", "pin the feature or token"], ["c", "card of the feature"], ["Esc", "let go"],
  ["Home End", "first or last token"], ["/", "search"], ["Tab", "from the text to the lists, and on"]];

function options(select, wanted, value) {
  const now = JSON.stringify(wanted);
  if (select.dataset.options !== now) {
    select.replaceChildren(...wanted.map(([one, text]) => make("option", { value: one }, text)));
    select.dataset.options = now;
  }
  select.value = value;
}

export function paintBar() {
  const all = layers();
  $("layers").hidden = all.length < 2;
  const one = all.includes(Number(view.layer)) ? view.layer : "";   // a URL may name one that is not served
  options($("layer"), [...all.map((layer) => [String(layer), String(layer)]), ["all", "side by side"]],
    view.layer === "all" ? "all" : one || String(all[0] ?? ""));
  const keys = view.colour && !view.pin.includes(view.colour) ? [view.colour, ...view.pin] : view.pin;
  options($("colour"), [["", "by surprise (score)"], ...keys.map((key) => [key, textOf(...partsOf(key))])], view.colour);
  $("dense").checked = view.dense === "";
  $("strip-open").open = view.strip === "";
  $("special").checked = view.special === "";
}

export function paintScale() {
  const now = `${top()}`;
  if ($("scale").dataset.top === now) return;
  $("scale").dataset.top = now;
  $("scale").replaceChildren("0 ", ...Array.from({ length: 9 }, (_, i) => make("i", { "data-level": i + 1 })), ` ${number(top())}+`);
}

// `waiting`: how many requests came meanwhile.
export const paintPause = (on, waiting = 0) =>
  say($("pause"), !on ? "Pause" : waiting ? `Resume (${waiting} new)` : "Resume");

// `pause(on)`: what comes is kept, and shown when it goes on.
export function listenToBar(pause) {
  const follow = (id, name, value) => $(id).addEventListener("change", () => set({ [name]: value($(id)) }));
  follow("layer", "layer", (select) => select.value);
  follow("colour", "colour", (select) => select.value);
  follow("sort", "sort", (select) => select.value);
  follow("dense", "dense", (box) => box.checked ? "" : "show");
  follow("special", "special", (box) => box.checked ? "" : "show");
  $("as-table").addEventListener("click", () => set({ table: view.table ? "" : "show" }));
  $("pause").addEventListener("click", () => {
    const on = $("pause").getAttribute("aria-pressed") !== "true";
    $("pause").setAttribute("aria-pressed", on);
    paintPause(on);
    pause(on);
  });
  $("strip-open").addEventListener("toggle", () => set({ strip: $("strip-open").open ? "" : "hide" }));
  $("help").addEventListener("click", () => {
    $("note").replaceChildren(make("h2", { id: "note-title" }, "Keys"),
      make("dl", {}, ...KEYS.flatMap(([key, what]) => [make("dt", {}, make("kbd", {}, key)), make("dd", {}, what)])),
      make("button", { type: "button", onclick: () => $("note").close() }, "Close"));
    $("note").showModal();
  });
}

// Finding features: by the words of their labels, by index, by a text they fire on.

import { about, shown } from "./about.js";
import { get } from "./api.js";
import { $, inline, make } from "./dom.js";
import { ranked } from "./filters.js";
import { firesOn } from "./fires.js";
import { learn } from "./names.js";
import { featureRow, strength } from "./rows.js";
import { set, view } from "./state.js";

const LIMIT = 50;
let asked = 0;                 // only the latest answer is shown

function fill(title, ...content) {
  $("found").hidden = false;
  $("found").replaceChildren(make("h2", {}, inline(title)),
    make("button", { type: "button", class: "close", onclick: close }, "Close"), ...content);
}

function close() {
  asked++;
  $("found").hidden = true;
  $("found").replaceChildren();
  set({ find: "", by: "" });
}

const row = (label) => featureRow(label.layer, label.index, {
  known: { label: label.text, unreliable: label.unreliable },
  numbers: [label.labeller, label.score === null || label.score === undefined ? null : `label's score ${label.score}`].filter(Boolean).join(" · ") || "no label",
});

const widthOf = (layer) => about.sites.find((site) => site.layer === layer)?.sae.width ?? Infinity;
const range = (layer) => `layer ${layer} has 0 to ${widthOf(layer) - 1}`;

async function byWords(words) {
  const index = /^\d+$/.test(words) ? Number(words) : null;
  const query = new URLSearchParams(index === null ? { q: words, limit: LIMIT } : { index, limit: LIMIT });
  const { data, total } = await get(`v1/features/labels?${query}`);
  const bare = index === null ? [] : shown().filter((layer) => index < widthOf(layer) && !data.some((one) => one.layer === layer))
    .map((layer) => ({ layer, index }));
  const found = [...data, ...bare];
  for (const one of data) learn(one.layer, one.index, { label: one.text, unreliable: one.unreliable });
  if (!found.length) return [index === null ? `No label has “${words}”` : `No feature ${index}: ${shown().map(range).join(", ")}`, []];
  return [total > found.length ? `${found.length} of ${total} found for “${words}”` : `${found.length} found for “${words}”`, found.map(row)];
}

async function byText(text) {
  const trace = await firesOn(text), tokens = trace.tokens.length;
  const found = ranked(trace, shown([...trace.layers.keys()]), LIMIT);
  return [`Fires on “${text}”`, found.map((one) => featureRow(one.layer, one.index, {
    numbers: `${strength(one)} · on ${one.count} of ${tokens}`, share: one.activation / Math.max(...found.map((f) => f.activation)),
  }))];
}

async function search(find, text) {
  const mine = ++asked;
  fill("Searching…");
  try {
    const [title, rows] = await find(text);
    if (mine === asked) fill(title, make("ol", {}, ...rows));
  } catch (error) {
    if (mine === asked) fill("Not found", make("p", { role: "alert" }, error.message));
  }
}

export function searchAgain() {
  $("query").value = view.find;
  if (view.find) search(view.by === "text" ? byText : byWords, view.find);
}

export function listenToSearch() {
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    const words = $("query").value.trim();
    if (!words) return close();
    set({ find: words, by: "" });
    return search(byWords, words);
  });
  $("fires").addEventListener("click", () => {
    const text = $("query").value;
    if (!text.trim()) return $("query").focus();
    set({ find: text, by: "text" });
    return search(byText, text);
  });
  $("query").addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });
}

// Finding features: by the words of their labels, by index, by a text they fire on.

import { shown } from "./about.js";
import { get } from "./api.js";
import { $, inline, make } from "./dom.js";
import { ranked } from "./filters.js";
import { firesOn } from "./fires.js";
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
  set({ find: "" });
}

const row = (label) => featureRow(label.layer, label.index, {
  known: { label: label.text, unreliable: label.unreliable },
  numbers: [label.labeller, label.score === null || label.score === undefined ? null : `label's score ${label.score}`].filter(Boolean).join(" · ") || "no label",
});

async function byWords(words) {
  const index = /^\d+$/.test(words) ? Number(words) : null;
  const query = new URLSearchParams(index === null ? { q: words, limit: LIMIT } : { index, limit: LIMIT });
  const { data, total } = await get(`v1/features/labels?${query}`);
  const bare = index === null ? [] : shown().filter((layer) => !data.some((one) => one.layer === layer)).map((layer) => ({ layer, index }));
  const found = [...data, ...bare];
  return [found.length ? `${total || found.length} found for “${words}”` : `No label has “${words}”`, found.map(row)];
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
  if (view.find) search(byWords, view.find);
}

export function listenToSearch() {
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    const words = $("query").value.trim();
    if (!words) return close();
    set({ find: words });
    return search(byWords, words);
  });
  $("fires").addEventListener("click", () => {
    const text = $("query").value;
    if (text.trim()) search(byText, text);
    else $("query").focus();
  });
  $("query").addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });
}

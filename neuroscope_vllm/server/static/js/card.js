// The feature card: what is known of one feature.

import { get } from "./api.js";
import { $, inline, make, number, percent } from "./dom.js";
import { activationsOn } from "./fires.js";
import { example, examples, histogram, logits } from "./parts.js";
import { featureRow, nameOf } from "./rows.js";
import { partsOf } from "./names.js";
import { set, view } from "./state.js";
import { steerForm } from "./steer.js";

let showing = "";

// As the URL says: opens, changes or closes.
export async function paintCard() {
  const dialog = $("card"), key = view.card;
  if (key === showing) return;
  showing = key;
  if (!key) { dialog.close(); return; }
  const [layer, index] = partsOf(key), path = `v1/features/${index}?layer=${layer}`;
  dialog.replaceChildren(head(layer, index, make("span", {}, "reading…")));
  if (!dialog.open) dialog.showModal();
  try {
    // The weights take a second the first time; the rest need not wait for them.
    const quick = await get(`${path}&weights=false`);
    if (showing !== key) return;
    const weights = make("div", { class: "weights" }, make("p", { class: "quiet", role: "status" }, "reading weights…"));
    dialog.replaceChildren(...body(quick, weights));
    const whole = await get(path).catch((error) => ({ missing: { promoted: error.message } }));
    if (showing === key) weights.replaceChildren(...ofWeights(whole));
  } catch (error) {
    if (showing === key) dialog.replaceChildren(head(layer, index, "Nothing to show"), make("p", { role: "alert" }, error.message));
  }
}

export function listenToCard() {
  $("card").addEventListener("close", () => { if (view.card) set({ card: "" }); });
  $("card").addEventListener("click", (event) => { if (event.target === $("card")) $("card").close(); });
}

const head = (layer, index, name) => make("header", {},
  make("h2", { id: "card-title", tabindex: -1, autofocus: true }, name),
  make("button", { type: "button", onclick: () => $("card").close() }, "Close"),
  make("p", {}, `feature ${index} of layer ${layer}`));

function body(card, weights) {
  const { layer, index, label } = card;
  const name = nameOf(layer, index, { label: label?.text, unreliable: label?.unreliable });
  return [
    head(layer, index, name),
    make("p", { class: "source" }, ...source(label), ...link(card)),
    ...(card.labels.length > 1 ? [make("details", {}, make("summary", {}, `${card.labels.length} labels`),
      make("ul", {}, ...card.labels.map((one) => make("li", {}, inline(one.text), make("small", {}, ` ${credit(one)}`)))))] : []),
    make("p", {}, facts(card)),
    card.histogram ? histogram(card.histogram) : missing(card, "histogram"),
    make("section", { class: "examples" }, make("h3", {}, "Where it fires"), ...(card.examples ? examples(card.examples) : [missing(card, "examples")])),
    tryText(card),
    steerForm(card),
    weights,   // last: it comes late, and nothing should move that somebody reads
  ];
}

const credit = (label) => [label.labeller, label.method && `method ${label.method}`, label.model && `model ${label.model}`,
  label.score === null || label.score === undefined ? "not scored" : `score ${number(label.score)}`,
  label.unreliable && "unreliable: little better than chance"].filter(Boolean).join(" · ");

const source = (label) => label ? [credit(label)] : ["Unlabelled: nobody has said yet what it stands for."];

// Only where a server's word is an address of Neuronpedia's.
const link = ({ neuronpedia }) => neuronpedia?.startsWith("https://www.neuronpedia.org/")
  ? [" · ", make("a", { href: neuronpedia, target: "_blank", rel: "noreferrer noopener" }, "Neuronpedia")] : [];

// Of a folder its end is enough.
const nameOfSAE = (sae) => sae.startsWith("/") ? sae.split("/").slice(-2).join("/") : sae;

function facts(card) {
  if (card.density === null) return missing(card, "density");
  return `Fires on ${percent(card.density)} of tokens (${card.firings} of ${card.tokens})${card.dense ? ", so often that it says little" : ""};`
    + ` mean ${number(card.mean)}, largest ${number(card.max)}. SAE: ${nameOfSAE(card.sae)}, ${card.width} features.`;
}

const missing = (card, what) => make("p", { class: "quiet" }, `No ${what}: ${card.missing?.[what] ?? "not known"}`);

function ofWeights(card) {
  const pairs = card.promoted && card.suppressed
    ? make("div", { class: "columns" }, logits("promotes", card.promoted), logits("suppresses", card.suppressed)) : missing(card, "promoted");
  if (!card.neighbours) return [pairs, ...(card.missing?.neighbours ? [missing(card, "neighbours")] : [])];
  return [pairs, make("section", { class: "neighbours" }, make("h3", {}, "Neighbours"), make("ol", {}, ...card.neighbours.map((one) => featureRow(card.layer, one.index,
    { known: one, numbers: `cosine ${number(one.cosine)}`, share: Math.max(0, one.cosine) }))))];
}

function tryText(card) {
  const text = make("textarea", { rows: 2, required: true, "aria-label": "text to try the feature on", placeholder: "A text of your own" });
  const shown = make("ol", { "aria-live": "polite" });
  const form = make("form", { class: "try" }, make("h3", {}, "Try a text"), text, make("button", {}, "Try"), shown);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    shown.replaceChildren(make("li", {}, "running…"));
    try {
      const { tokens, activations, top } = await activationsOn(text.value, card.layer, card.index);
      const activation = activations.reduce((most, one) => Math.max(most, one), 0);
      shown.replaceChildren(activation > 0
        ? example({ tokens, activations, activation, at: activations.indexOf(activation) })
        : make("li", {}, top ? "It is not among the strongest features of any of these tokens." : "It fires on none of these tokens."));
    } catch (error) { shown.replaceChildren(make("li", { role: "alert" }, error.message)); }
  });
  return form;
}

// The pictures and lists of a feature's card.

import { inline, make, number, visible } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";

function shape(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

// Firings by activation, on a logarithmic axis as the calibration counts them.
export function histogram({ edges, counts }) {
  const used = counts.map((count, i) => [count, i]).filter(([count]) => count > 0).map(([, i]) => i);
  if (!used.length) return make("p", { class: "quiet" }, "it never fired in the calibration");
  const from = used[0], to = used.at(-1) + 1, shown = counts.slice(from, to), most = Math.max(...shown);
  const peak = from + shown.indexOf(most);
  const svg = shape("svg", { viewBox: `0 0 ${shown.length} 40`, preserveAspectRatio: "none", class: "histogram", role: "img",
    "aria-label": `activations from ${number(edges[from])} to ${number(edges[to])}, most often ${number(edges[peak])} to ${number(edges[peak + 1])}` });
  shown.forEach((count, i) => {
    const bar = shape("rect", { x: i + 0.05, width: 0.9, y: 40 - 40 * count / most, height: 40 * count / most });
    bar.append(shape("title", {}));
    bar.firstChild.textContent = `${number(edges[from + i])} to ${number(edges[from + i + 1])}: ${count}`;
    svg.append(bar);
  });
  return make("figure", {}, svg, make("figcaption", {}, make("span", {}, number(edges[from])), make("span", {}, "activation, log scale"), make("span", {}, number(edges[to]))));
}

// A text with its tokens coloured by the feature, the one it is an example of marked.
export function example({ tokens, activations, at, activation }, most = activation) {
  const spans = tokens.map((text, i) => {
    const value = activations[i] ?? 0, level = value > 0 ? Math.min(9, Math.max(1, Math.ceil(9 * value / most))) : 0;
    return make(i === at ? "mark" : "span", { class: "t", "data-level": level || null, title: value > 0 ? number(value) : null },
      visible(text).replaceAll("\n", "⏎ ") || "·");
  });
  return make("li", { class: "example" }, make("small", {}, `${number(activation)} `), make("span", { class: "words", dir: "auto" }, ...spans));
}

export function examples({ top, quantiles }) {
  const most = top[0]?.activation;
  const list = (shown) => make("ol", {}, ...shown.map((one) => example(one, most)));
  return [make("h4", {}, "strongest"), list(top), ...quantiles.map((quarter) => make("details", {},
    make("summary", {}, `activation ${number(quarter.from)} to ${number(quarter.to)}`), list(quarter.examples)))];
}

// Tokens and what the feature adds to their logits: orange up, blue down.
export function logits(title, found) {
  const most = Math.max(...found.map((one) => Math.abs(one.logit)));
  return make("section", {}, make("h3", {}, title), make("ol", { class: "logits" }, ...found.map(({ token, logit }) => {
    const bar = make("span", { class: logit < 0 ? "bar down" : "bar up", "aria-hidden": "true" });
    bar.style.setProperty("--share", most ? (Math.abs(logit) / most).toFixed(3) : "0");
    return make("li", {}, make("bdi", {}, inline(token) || "·"), make("small", {}, ` ${logit > 0 ? "+" : ""}${number(logit)}`), bar);
  })));
}

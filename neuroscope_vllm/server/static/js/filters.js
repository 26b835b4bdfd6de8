// What is left out: special tokens, and features that fire nearly everywhere.

import { about } from "./about.js";
import { keyOf, names } from "./store.js";
import { view } from "./state.js";

export const hiddenToken = (trace, at) => view.special === "" && about.special.has(trace.tokens[at]?.id);

export const hiddenFeature = (layer, index) => view.dense === "" && names.get(keyOf(layer, index))?.dense === true;

// Features of a token at a layer that are not left out, best first.
export function features(trace, layer, at) {
  if (hiddenToken(trace, at)) return [];
  return (trace.layers.get(layer)?.features(at) ?? []).filter(({ index }) => !hiddenFeature(layer, index));
}

const by = {
  surprise: (a, b) => b.score - a.score,
  activation: (a, b) => b.activation - a.activation,
  frequency: (a, b) => b.count - a.count || b.score - a.score,
};

// What fired in a trace at a layer: index -> {index, count, activation, score}.
export const sums = (trace, layer) => trace.layers.get(layer)?.sums(trace.tokens.length,
  (at) => hiddenToken(trace, at), `${view.special}${about.special.size}`) ?? new Map();

// Features of a trace at these layers: {layer, index, count, activation, score}, in the chosen order.
export function ranked(trace, among, limit) {
  const found = [];
  for (const layer of among) {
    for (const sum of sums(trace, layer).values()) if (!hiddenFeature(layer, sum.index)) found.push({ layer, ...sum });
  }
  return found.sort(by[view.sort] ?? by.surprise).slice(0, limit);
}

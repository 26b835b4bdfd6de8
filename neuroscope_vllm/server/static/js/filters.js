// What is left out: special tokens, and features that fire nearly everywhere.

import { about } from "./about.js";
import { known } from "./names.js";
import { view } from "./state.js";

export const hiddenToken = (trace, at) => view.special === "" && about.special.has(trace.tokens[at]?.id);

export const hiddenFeature = (layer, index) => view.dense === "" && known(layer, index)?.dense === true;

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

// Where there is an answer, lists are about it: chat templates alone would fill them.
export const answered = (trace) => trace.prompt < trace.tokens.length - 1;
export const counted = (trace) => answered(trace) ? trace.tokens.length - trace.prompt : trace.tokens.length;

// What fired in a trace at a layer: index -> {index, count, activation, score}.
export const sums = (trace, layer) => trace.layers.get(layer)?.sums(trace.tokens.length,
  (at) => answered(trace) && trace.tokens[at].prompt || hiddenToken(trace, at),
  `${view.special}${about.special.size}${answered(trace)}`) ?? new Map();

// The best features of a trace at these layers: {layer, index, count, activation, score}, in the
// chosen order. Few are wanted of thousands, so they are picked, not sorted.
export function ranked(trace, among, limit) {
  const order = by[view.sort] ?? by.surprise, best = [];
  for (const layer of among) {
    for (const sum of sums(trace, layer).values()) {
      if (best.length === limit && order(sum, best.at(-1)) >= 0 || hiddenFeature(layer, sum.index)) continue;
      let at = best.length;
      while (at > 0 && order(sum, best[at - 1]) < 0) at--;
      best.splice(at, 0, { layer, ...sum });
      if (best.length > limit) best.pop();
    }
  }
  return best;
}

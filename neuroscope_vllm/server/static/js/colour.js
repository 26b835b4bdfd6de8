// How strongly a token is coloured: ten levels of one scale, the same for all that is on the page.

import { shown } from "./about.js";
import { hiddenFeature, hiddenToken } from "./filters.js";
import { partsOf } from "./names.js";
import { view } from "./state.js";

const STEPS = [1, 1.5, 2, 3, 4, 5, 7.5, 10];
let key = null, seen = new WeakMap();
let best = { prompt: 0, answer: 0 };   // the largest values so far
let most = 0;                          // the scale's end

export const top = () => most;

function above(value) {
  if (!value) return 0;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * STEPS.find((step) => step * power >= value * (1 - 1e-9));
}

// What a token's colour stands for: activation of the chosen feature, or its best score.
export function value(trace, at) {
  if (hiddenToken(trace, at)) return 0;
  if (view.colour) {
    const [layer, index] = partsOf(view.colour);
    return trace.layers.get(layer)?.activationAt(at, index) ?? 0;
  }
  let best = 0;
  for (const number of shown([...trace.layers.keys()])) {
    const layer = trace.layers.get(number);
    const from = layer?.start[at] ?? 0, to = from + (layer?.count[at] ?? 0);
    for (let i = from; i < to; i++) {
      if (layer.score[i] > best && !hiddenFeature(number, layer.index[i])) best = layer.score[i];
    }
  }
  return best;
}

export const level = (value) => value > 0 && most > 0 ? Math.min(9, Math.max(1, Math.ceil(9 * value / most))) : 0;

// Fit the scale to tokens that came since; true where all must be coloured anew. It ends where
// answers do: the words of chat templates would leave them pale.
export function fit(traces) {
  const now = [view.colour, view.special, view.dense, view.layer].join();
  const anew = now !== key;
  if (anew) { key = now; best = { prompt: 0, answer: 0 }; seen = new WeakMap(); }
  for (const trace of traces) {
    for (let at = seen.get(trace) ?? 0; at < trace.tokens.length; at++) {
      const kind = trace.tokens[at].prompt ? "prompt" : "answer";
      best[kind] = Math.max(best[kind], value(trace, at));
    }
    seen.set(trace, trace.tokens.length);
  }
  const end = above(best.answer || best.prompt), other = end !== most;
  most = end;
  return anew || other;
}

// The token and the feature that are looked at.

import { set, view } from "./state.js";
import { traces } from "./store.js";

export const focus = {
  trace: null,           // the request that list and strip are about
  at: -1,                // its token; -1: none
  row: -1,               // the feature of the token that the arrow keys chose
  feature: null,         // [layer, index] under the pointer
};
let tokenMoved = () => {}, featureMoved = () => {};

export function onFocus(token, feature) {
  tokenMoved = token;
  featureMoved = feature;
}

// A token as the URL names it.
export const tokenName = (trace, at) => `${trace.internalId}@${trace.first + at}`;

export function look(trace, at) {
  if (focus.trace === trace && focus.at === at) return;
  Object.assign(focus, { trace, at, row: -1 });
  tokenMoved();
}

// Pins a token, so that the pointer no longer changes what is shown; a pinned one is let go.
export function pinToken(trace, at) {
  const name = tokenName(trace, at);
  set({ token: view.token === name ? "" : name });
  look(trace, at);
}

export function lookAtFeature(feature) {
  if (String(feature) === String(focus.feature)) return;
  focus.feature = feature;
  featureMoved();
}

// The pinned token of the URL, once its trace has it.
export function pinned() {
  const cut = view.token.lastIndexOf("@");
  const trace = traces.get(view.token.slice(0, cut));
  const at = trace ? Number(view.token.slice(cut + 1)) - trace.first : -1;
  return trace?.tokens[at] ? { trace, at } : null;
}

export function pinFeature(key) {
  const pin = view.pin.includes(key) ? view.pin.filter((one) => one !== key) : [...view.pin, key];
  const colour = pin.includes(key) ? key : view.colour === key ? "" : view.colour;
  set({ pin, colour });
}

// All that the page has heard: traces by the engine's id.

import { learn } from "./names.js";
import { Trace } from "./trace.js";

export const traces = new Map();
const changed = new Set();
let onChange = () => {}, onGap = () => {};

// `heard` is called after every event, `gap(text, lost)` for what no single request lost; `lost`:
// events went by that the server may still have.
export function listen(heard, gap) {
  onChange = heard;
  onGap = gap;
}

export const pending = () => [...changed];

export function changes() {
  const found = [...changed];
  changed.clear();
  return found;
}

// By any of its ids: what the client sent, what vLLM made of it, the engine's.
export const isOf = (trace, id) =>
  [id, `chatcmpl-${id}`, `cmpl-${id}`].includes(trace.requestId) || trace.internalId === id
  || trace.requestId.startsWith(`cmpl-${id}-`);

export const tracesOf = (id) => [...traces.values()].filter((trace) => isOf(trace, id))
  .sort((a, b) => a.choice - b.choice);

export function forget(trace) {
  traces.delete(trace.internalId);
  changed.delete(trace);
}

function open(event) {
  let trace = traces.get(event.internal_id);
  if (!trace) traces.set(event.internal_id, trace = new Trace(event));
  return trace;
}

function learnAll(event) {
  for (const feature of event.top_features) learn(event.layer, feature.index, { dense: false, ...feature });
}

const gapText = (event) =>
  `gap: ${event.count ?? "some"} ${event.reason === "dropped" ? "tokens without features" : "events"} (${event.reason.replace("_", " ")})`;

const tellers = {
  request: (trace, event) => trace.begin(event),
  prompt: (trace, event) => { learnAll(event); trace.token(event); },
  token: (trace, event) => { learnAll(event); trace.token(event); },
  rule: (trace, event) => trace.note(`⚑ ${event.tag ?? event.rule}`,
    `feature ${event.feature} of layer ${event.layer} at ${event.activation}${event.stop ? ", which ends the answer" : ""}`),
  steering: (trace, event) => {
    trace.steering = event.steering;
    trace.note(event.steering ? "⚑ steered otherwise from here" : "⚑ steered no more from here");
  },
  gap: (trace, event) => trace.note(gapText(event)),
  error: (trace, event) => trace.note(event.error.message),
  done: (trace, event) => {
    trace.done = event;
    if (event.finish_reason !== "stop") trace.note(`ends: ${event.finish_reason}`);
  },
};

// A trace as GET /v1/requests/{id} tells it, kept apart from those on the page.
export function retell(events) {
  const trace = new Trace(events[0]);
  for (const event of events) {
    if (["prompt", "token"].includes(event.event)) learnAll(event);
    if (event.event === "request") trace.begin(event);
    else if (event.event === "prompt" || event.event === "token") trace.token(event);
  }
  return trace;
}

export function take(name, event, id) {
  if (!event.internal_id) {
    if (name === "gap") onGap(gapText(event), true);
    else if (name === "goodbye") onGap(`the server stops (${event.reason})`, false);
    return;
  }
  const trace = open(event), told = ["prompt", "token", "request"].includes(name);
  if (!tellers[name] || !trace.news(id) && !told) return;
  tellers[name](trace, event);
  changed.add(trace);
  onChange();
}

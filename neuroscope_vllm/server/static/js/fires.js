// What fires on a text: it runs through the model once, and the stream tells.

import { about } from "./about.js";
import { get, post } from "./api.js";
import { newProbe } from "./sent.js";
import { retell } from "./store.js";

const WAIT_MS = 30_000;

// The trace of the text's own tokens. `prompt_features: all`: cached tokens run, too. `more`: what
// else is asked of neuroscope.
export async function firesOn(text, more = {}) {
  const id = newProbe();
  const answer = await post("v1/completions", { model: about.model, prompt: text, max_tokens: 1, temperature: 0,
    vllm_xargs: { neuroscope: JSON.stringify({ prompt_features: "all", ...more }) } }, { id });
  const name = (await answer.json()).id ?? id;
  for (const end = Date.now() + WAIT_MS; Date.now() < end;) {
    const choice = await kept(name);
    if (choice?.finished) return retell(choice.events.filter((event) => event.event !== "token"));
    await new Promise((done) => setTimeout(done, 100));
  }
  throw new Error(`the feature stream did not tell the end of ${name} in ${WAIT_MS / 1000} s`);
}

// The activation of one feature on every token of a text, on top or not: to scale it by one changes
// nothing, and what is steered is told. A server that refuses to steer tells of those on top alone
// (`top`). {tokens, activations, top}
export async function activationsOn(text, layer, index) {
  let trace, top = false;
  try {
    trace = await firesOn(text, { steer: [{ op: "scale", layer, feature: index, value: 1 }] });
  } catch (error) {
    if (error.status !== 400) throw error;
    top = true;
    trace = await firesOn(text);
  }
  const data = trace.layers.get(layer);
  const activations = trace.tokens.map((_, at) =>
    (top ? data?.activationAt(at, index) : data?.steered.get(at)?.find((one) => one.index === index)?.after) ?? 0);
  return { tokens: trace.tokens.map((token) => token.text), activations, top };
}

async function kept(name) {
  try {
    return (await get(`v1/requests/${encodeURIComponent(name)}`)).choices[0];
  } catch (error) {
    if (error.status === 404) return null;   // not heard of yet
    throw error;
  }
}

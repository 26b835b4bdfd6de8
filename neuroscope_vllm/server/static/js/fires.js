// What fires on a text: it runs through the model once, and the stream tells.

import { about } from "./about.js";
import { get, post } from "./api.js";
import { newId } from "./sent.js";
import { retell } from "./store.js";

const WAIT_MS = 30_000;

// The trace of the text's own tokens. `prompt_features: all`: cached tokens run, too.
export async function firesOn(text) {
  const id = newId();
  const answer = await post("v1/completions", { model: about.model, prompt: text, max_tokens: 1, temperature: 0,
    vllm_xargs: { neuroscope: JSON.stringify({ prompt_features: "all" }) } }, { id });
  const name = (await answer.json()).id ?? id;
  for (const end = Date.now() + WAIT_MS; Date.now() < end;) {
    const choice = await kept(name);
    if (choice?.finished) return retell(choice.events.filter((event) => event.event !== "token"));
    await new Promise((done) => setTimeout(done, 100));
  }
  throw new Error(`the feature stream did not tell the end of ${name} in ${WAIT_MS / 1000} s`);
}

async function kept(name) {
  try {
    return (await get(`v1/requests/${encodeURIComponent(name)}`)).choices[0];
  } catch (error) {
    if (error.status === 404) return null;   // not heard of yet
    throw error;
  }
}

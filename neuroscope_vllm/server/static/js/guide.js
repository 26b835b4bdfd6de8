// What to ask first: suggestions of the server, there until the page has a turn.

import { about } from "./about.js";
import { ask, firstMessages, user } from "./chat.js";
import { $, inline, make, visible } from "./dom.js";

let shown = "";

export function paintGuide() {
  const now = JSON.stringify(about.guide);
  if (now === shown) return;
  shown = now;
  $("guide").hidden = !about.guide.length;
  $("guide").replaceChildren(make("h2", {}, "Try one of these"), make("ul", {}, ...about.guide.map((one, i) => make("li", {},
    make("button", { type: "button", "aria-describedby": `look-${i}`, onclick: () => begin(one) },
      make("strong", {}, inline(one.title)), " ", make("q", {}, inline(one.prompt))),
    make("p", { class: "quiet", id: `look-${i}` }, visible(one.look_for),
      one.preset ? ` Answered twice: without, and steered by preset ${inline(one.preset)}.` : "")))));
}

// Greedy, so that everybody sees what the guide speaks of.
function begin({ prompt, look_for, preset, max_tokens }) {
  $("text").focus();   // the button goes
  const asked = { messages: [...firstMessages(), user(prompt)], temperature: 0, ...(max_tokens && { max_tokens }) };
  if (preset === null) return ask([asked], [], look_for);
  ask([asked, { ...asked, vllm_xargs: { neuroscope: JSON.stringify({ preset }) } }], ["without", `preset ${preset}`], look_for);
}

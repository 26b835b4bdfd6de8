// What to ask first: suggestions of the server, there until the page has a turn.

import { about } from "./about.js";
import { ask, send, user } from "./chat.js";
import { $, inline, make, visible } from "./dom.js";

let shown = "";

export function paintGuide() {
  const now = JSON.stringify(about.guide);
  if (now === shown) return;
  shown = now;
  $("guide").hidden = !about.guide.length;
  $("guide").replaceChildren(make("h2", {}, "Try one of these"), make("ul", {}, ...about.guide.map((one) => make("li", {},
    make("button", { type: "button", onclick: () => begin(one) }, make("strong", {}, inline(one.title)), " ", make("q", {}, visible(one.prompt))),
    one.look_for ? make("p", { class: "quiet" }, visible(one.look_for)) : null))));
}

function begin({ prompt, preset }) {
  if (!preset) return send(prompt);
  const asked = { messages: [user(prompt)], temperature: 0 };
  ask([asked, { ...asked, vllm_xargs: { neuroscope: JSON.stringify({ preset }) } }], ["without", `preset ${preset}`]);
}

// The chat: messages through the pass-through, their tokens and features from the stream.

import { about } from "./about.js";
import { get, post, sse } from "./api.js";
import { $, make, tell } from "./dom.js";
import { focus } from "./focus.js";
import { newId, sent } from "./sent.js";
import { set, view } from "./state.js";
import { take, tracesOf } from "./store.js";
import { toEnd } from "./scroll.js";
import { menu } from "./share.js";
import { addTurn, plainAnswer, removeTurn, turns } from "./transcript.js";
import { subscribe, unsubscribe } from "./streams.js";

const running = new Map();     // id -> AbortController

function options() {
  const temperature = $("temperature").value, most = Number($("max-tokens").value);
  return { max_tokens: most > 0 ? most : 256, ...(temperature === "" ? {} : { temperature: Number(temperature) }) };
}

// Messages before the next one: the last turn's and its answer.
function history() {
  const last = turns.findLast((turn) => !turn.watched), record = last && sent.get(last.ids[0]);
  if (record) return [...record.body.messages, { role: "assistant", content: record.answer }];
  const system = $("system").value.trim();
  return system ? [{ role: "system", content: system }] : [];
}

export const lastMessages = () => {
  const last = turns.findLast((turn) => !turn.watched), record = last && sent.get(last.ids[0]);
  return record ? record.body.messages : [...history(), { role: "user", content: "" }];
};

const names = () => turns.filter((turn) => !turn.watched).map((turn) => turn.ids.join("~"));

// One turn: `variants` are what the bodies differ in; two of them stand side by side.
export function ask(messages, variants = [{}], titles = []) {
  const ids = variants.map(newId);
  const bodies = variants.map((more) => ({ model: about.model, messages, stream: true, ...options(), ...more }));
  ids.forEach((id, i) => sent.set(id, { body: bodies[i], answer: "", title: titles[i] ?? "" }));
  // Who begins to chat wants to read that; others can be watched again by choice.
  const first = !turns.some((one) => !one.watched), turn = place(ids);
  set({ turn: names(), token: "", ...(first && view.watch === "all" ? { watch: "mine" } : {}) }, true);
  Object.assign(focus, { trace: null, at: -1, row: -1 });
  toEnd();
  for (const [i, id] of ids.entries()) {
    if (view.watch !== "all") subscribe(id);
    run(turn, i, id);
  }
}

function place(ids) {
  const records = ids.map(sent.get), last = records[0]?.body.messages.at(-1);
  return addTurn({ ids, titles: records.map((record) => record?.title), asked: last?.content ?? null }, buttons);
}

async function run(turn, which, id) {
  const stopping = new AbortController(), record = sent.get(id);
  running.set(id, stopping);
  busy();
  let failed = "";
  try {
    const answer = await post("v1/chat/completions", record.body, { id, signal: stopping.signal });
    for await (const { data } of sse(answer)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      record.answer += chunk.choices?.[0]?.delta?.content ?? "";
      plainAnswer(turn, which, record.answer);
    }
  } catch (error) {
    if (!stopping.signal.aborted) failed = `chat: ${error.message}`;
  }
  running.delete(id);
  busy();
  sent.set(id, record);
  if (!failed) return;
  plainAnswer(turn, which, record.answer, failed);
  tell(failed);
  if (!tracesOf(id).length) unsubscribe(id);   // it never began
}

function busy() {
  $("stop").hidden = running.size === 0;
  $("send").disabled = running.size > 0;
}

export function stop() {
  for (const one of running.values()) one.abort();
}

function removeMine(from = 0) {
  for (const turn of turns.slice(from)) if (!turn.watched) removeTurn(turn);
}

// Turns of the URL: what the server still keeps of them.
export async function restore() {
  stop();
  removeMine();
  for (const name of view.turn) {
    const turn = place(name.split("~"));
    turn.ids.forEach((id, which) => load(id).catch((error) => plainAnswer(turn, which, sent.get(id)?.answer ?? "", error.message)));
  }
}

export async function load(id) {
  const { choices } = await get(`v1/requests/${encodeURIComponent(id)}`);
  for (const { events } of choices) for (const event of events) take(event.event, event, event.id);
  if (view.watch !== "all" && choices.some((choice) => !choice.finished)) subscribe(id);
}

// My requests that run were told with all others until now.
export function followMine() {
  for (const id of running.keys()) subscribe(id);
}

function buttons(turn) {
  const ours = sent.get(turn.ids[0]);
  return [
    ours && make("button", { type: "button", class: "edit", onclick: () => edit(turn) }, "Edit"),
    ours && make("button", { type: "button", class: "resend", onclick: () => again(turn, ours.body.messages) }, "Resend"),
    menu(turn),
  ].filter(Boolean);
}

// The turns from this one on give way to another answer; Back brings them back.
function again(turn, messages) {
  const records = turn.ids.map(sent.get);
  stop();
  removeMine(turns.indexOf(turn));
  ask(messages, records.map(({ body }) => body.vllm_xargs ? { vllm_xargs: body.vllm_xargs, temperature: body.temperature } : {}),
    records.map((record) => record.title));
}

function edit(turn) {
  if (turn.element.querySelector("form.editing")) return;
  const { messages } = sent.get(turn.ids[0]).body;
  const text = make("textarea", { "aria-label": "message", rows: 3, required: true });
  text.value = messages.at(-1).content;
  const form = make("form", { class: "editing" }, text, make("button", {}, "Send instead"),
    make("button", { type: "button", onclick: () => form.remove() }, "Cancel"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    again(turn, [...messages.slice(0, -1), { role: "user", content: text.value }]);
  });
  turn.element.querySelector("header").after(form);
  text.focus();
}

export function listenToChat() {
  const text = $("text");
  $("chat").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running.size || !text.value.trim()) return;
    ask([...history(), { role: "user", content: text.value }]);
    text.value = "";
  });
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("chat").requestSubmit();
  });
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", () => {
    stop();
    set({ turn: [], token: "" }, true);
    removeMine();
    text.focus();
  });
}

// The chat: messages through the pass-through, their tokens and features from the stream.

import { about } from "./about.js";
import { get, post, sse } from "./api.js";
import { $, inline, make, tell } from "./dom.js";
import { focus } from "./focus.js";
import { newId, sent } from "./sent.js";
import { set, view } from "./state.js";
import { take, tracesOf } from "./store.js";
import { toEnd, toTurn } from "./scroll.js";
import { menu } from "./share.js";
import { addTurn, plainAnswer, removeTurn, turns } from "./transcript.js";
import { subscribe, unsubscribe } from "./streams.js";

const running = new Map();     // id -> AbortController

function options() {
  const temperature = $("temperature").value, most = Number($("max-tokens").value);
  return { max_tokens: most > 0 ? most : 256, ...(temperature === "" ? {} : { temperature: Number(temperature) }) };
}

const recordsOf = (turn) => turn.ids.map(sent.get);
const mine = () => turns.filter((turn) => !turn.watched);
export const user = (content) => ({ role: "user", content });

// What was sent in the turn that a message goes on from, which is the last one that was answered;
// none where that was in another tab, whose messages nobody here knows.
function goesOn() {
  for (const turn of mine().reverse()) {
    const records = recordsOf(turn);
    if (records.some((record) => !record)) return [];
    if (records.every((record) => record.answer)) return records;
  }
  return [];
}

export function firstMessages() {
  const system = $("system").value.trim();
  return system ? [{ role: "system", content: system }] : [];
}

// The last message and those before it.
export function lastMessages() {
  const record = mine().map(recordsOf).at(-1)?.[0];
  return record ? record.body.messages : [...firstMessages(), user("")];
}

const names = () => mine().map((turn) => turn.ids.join("~"));

// One turn. `variants`: of each answer its messages and what else its body has; two stand side by side.
// `remark`: what to say above them.
export function ask(variants, titles = [], remark = "") {
  const ids = variants.map(() => newId());
  const bodies = variants.map((variant) => ({ model: about.model, stream: true, ...options(), ...variant }));
  ids.forEach((id, i) => sent.set(id, { body: bodies[i], answer: "", title: titles[i] ?? "", remark }));
  // Who begins to chat wants to read that; others can be watched again by choice.
  const first = !mine().length, turn = place(ids);
  set({ turn: names(), token: "", ...(first && view.watch === "all" ? { watch: "mine" } : {}) }, true);
  Object.assign(focus, { trace: null, at: -1, row: -1 });
  // Answers side by side are read from their start.
  if (ids.length > 1) toTurn(turn.element);
  else toEnd();
  for (const [i, id] of ids.entries()) {
    if (view.watch !== "all") subscribe(id);
    run(turn, i, id);
  }
}

// A message goes on from both answers where two stand side by side.
export function send(text) {
  const records = goesOn();
  if (!records.length) return ask([{ messages: [...firstMessages(), user(text)] }]);
  return ask(records.map((record) => ({ ...varied(record),
    messages: [...record.body.messages, { role: "assistant", content: record.answer }, user(text)] })), titlesOf(records));
}

const titlesOf = (records) => records.map((record) => record.title);
// What sets one of two answers apart; options of single ones are those of the form.
const varied = ({ title, body: { temperature, vllm_xargs } }) => title ? { temperature, vllm_xargs } : {};

function place(ids) {
  const records = ids.map(sent.get), known = records.every(Boolean), asked = records[0]?.body.messages.at(-1).content ?? null;
  return addTurn({ ids, asked, titles: records.map((record) => record?.title), heading: asked === null ? ids.join(" and ") : `“${inline(asked)}”`,
    remark: known ? records[0].remark : "Sent from another tab or browser: a message here begins a new chat." }, buttons);
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
  if (!tracesOf(id).length) unsubscribe(id);   // it never began
  tell(failed);
}

function busy() {
  $("stop").hidden = running.size === 0;
  $("send").disabled = running.size > 0;
}

export function stop() {
  if (document.activeElement === $("stop")) $("text").focus();
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

// After a gap: what the server still has of requests whose end was not told.
export async function catchUp() {
  const ids = turns.flatMap((turn) => turn.ids).filter((id) => !tracesOf(id).length || tracesOf(id).some((trace) => !trace.done));
  for (const id of ids) await load(id).catch(() => {});   // gone: the gap has said so
}

// My requests that run were told with all others until now.
export function followMine() {
  for (const id of running.keys()) subscribe(id);
}

function buttons(turn) {
  const ours = sent.get(turn.ids[0]);
  return [
    ours && make("button", { type: "button", class: "edit", onclick: () => edit(turn) }, "Edit"),
    ours && make("button", { type: "button", class: "resend", onclick: () => again(turn) }, "Resend"),
    menu(turn),
  ].filter(Boolean);
}

// The turns from this one on give way to another answer, to another message where `text` is given;
// Back brings them back.
function again(turn, text = null) {
  const records = recordsOf(turn);
  stop();
  removeMine(turns.indexOf(turn));
  ask(records.map((record) => {
    const { messages } = record.body;
    return { ...varied(record), messages: text === null ? messages : [...messages.slice(0, -1), user(text)] };
  }), titlesOf(records));
  $("text").focus();
}

function edit(turn) {
  if (turn.element.querySelector("form.editing")) return;
  const { messages } = sent.get(turn.ids[0]).body;
  const text = make("textarea", { "aria-label": "message", rows: 3, required: true });
  text.value = messages.at(-1).content;
  const form = make("form", { class: "editing" }, text, make("button", {}, "Send instead"),
    make("button", { type: "button", onclick: cancel }, "Cancel"));
  function cancel() {
    form.remove();
    turn.element.querySelector(".edit").focus();
  }
  form.addEventListener("submit", (event) => { event.preventDefault(); again(turn, text.value); });
  text.addEventListener("keydown", onEnter(form));
  form.addEventListener("keydown", (event) => { if (event.key === "Escape") cancel(); });
  turn.element.querySelector("header").after(form);
  text.focus();
}

// Enter sends, Shift and Enter begin a line.
const onEnter = (form) => (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
};

export function listenToChat() {
  const text = $("text");
  $("chat").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running.size || !text.value.trim()) return;
    send(text.value);
    text.value = "";
  });
  // What is wrong in there would otherwise be said to nobody.
  $("options").addEventListener("invalid", () => { $("options").open = true; }, true);
  text.addEventListener("keydown", onEnter($("chat")));
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", () => {
    stop();
    set({ turn: [], token: "" }, true);
    removeMine();
    text.focus();
  });
}

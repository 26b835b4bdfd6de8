// The requests on the page, each with its tokens: my turns first of all, and others that are watched.

import { fit } from "./colour.js";
import { $, inline, make, number, say, visible } from "./dom.js";
import { focus } from "./focus.js";
import { forget, isOf, tracesOf } from "./store.js";
import { TokenView } from "./tokens.js";

export const KEPT = 100;       // watched requests on the page
const BUDGET = 500;            // tokens added in one frame

export const turns = [];       // {ids, asked, element, meta, bodies, watched}
const views = new Map();       // internal id -> TokenView
const waiting = new Set();     // traces with tokens that are not on the page yet

export const allViews = () => [...views.values()];
export const viewOf = (trace) => views.get(trace.internalId);
export const latest = () => turns.at(-1)?.ids.flatMap(tracesOf).at(-1) ?? null;

// A turn, or a request of somebody else (`watched`). `asked`: the message, shown until its tokens
// are there; `titles`: of each answer; `buttons(turn)` gives what stands in its head.
export function addTurn({ ids, heading, titles = [], asked = null, watched = false, remark = "" }, buttons) {
  const turn = { ids, asked, watched, meta: make("small", {}) };
  turn.bodies = ids.map((_, i) => {
    const parts = { named: make("h3", { hidden: !titles[i] }, inline(titles[i] ?? "")), plain: make("p", { class: "plain" }, visible(asked ?? "")),
      tokens: make("div"), failed: make("p", { class: "remark", role: "alert", hidden: true }) };
    return Object.assign(make("div", { class: "answer" }, ...Object.values(parts)), parts);
  });
  turn.changes = make("div", { class: "changes" });
  turn.element = make("article", { class: watched ? "turn watched" : "turn" },
    make("header", {}, make("h2", { title: ids.join(" and ") }, inline(heading), " ", turn.meta), ...buttons(turn)),
    remark ? make("p", { class: "quiet" }, visible(remark)) : null,
    make("div", { class: ids.length > 1 ? "answers pair" : "answers" }, ...turn.bodies), turn.changes);
  turns.push(turn);
  if (!watched) busy(turn, true);
  $("turns").append(turn.element);
  // Never one that is looked at.
  const old = turns.filter((one) => one.watched && !one.ids.flatMap(tracesOf).includes(focus.trace));
  if (turns.filter((one) => one.watched).length > KEPT) removeTurn(old[0], true);
  return turn;
}

export function removeTurn(turn, forgotten = false) {
  turn.element.remove();
  turns.splice(turns.indexOf(turn), 1);
  for (const trace of turn.ids.flatMap(tracesOf)) {
    views.delete(trace.internalId);
    if (forgotten) forget(trace);
  }
}

const busy = (turn, is) => turn.element.setAttribute("aria-busy", is);

// Every answer is told and shown to its end, or failed before it began.
const isOver = (turn) => turn.ids.every((id, i) => {
  const found = tracesOf(id);
  return found.length ? found.every((trace) => trace.done && !waiting.has(trace)) : !turn.bodies[i].failed.hidden;
});

// The text of an answer whose tokens the stream does not tell, or not yet.
export function plainAnswer(turn, which, text, error = "") {
  const { plain, failed } = turn.bodies[which];
  plain.replaceChildren(visible(turn.asked ?? ""), "\n\n", make("span", {}, visible(text)));
  if (!error) return;
  failed.replaceChildren(error);
  failed.hidden = false;
  busy(turn, !isOver(turn));
}

// When it began, and how it goes.
function describe(turn) {
  const found = turn.ids.flatMap(tracesOf);
  if (!found.length) return;
  const answers = found.map((trace) => trace.done ? `${trace.tokens.length - trace.prompt} tokens, ${trace.done.finish_reason}` : "running");
  say(turn.meta, `${new Date(found[0].created * 1000).toLocaleTimeString()} · ${answers.join(" · ")}`);
}

// How a request is steered, in words; "" where it is not.
function steered({ steering }) {
  const edits = (steering?.edits ?? []).map((one) => [one.op, one.value === undefined ? "" : number(one.value),
    one.feature === undefined ? one.direction : `feature ${one.feature}`].filter(Boolean).join(" "));
  return [...edits, ...(steering?.rules?.length ? [`${steering.rules.length} rules`] : [])].join(", ");
}

// What an earlier turn shows already is folded away. null: not known yet.
function begins(turn, trace) {
  const before = turns[turns.indexOf(turn) - 1];
  if (turn.watched || !before || before.watched || turn.unfolded) return 0;
  if (trace.asked !== null && trace.tokens.length < trace.asked && !trace.done) return null;
  const earlier = tracesOf(before.ids[turn.ids.findIndex((id) => isOf(trace, id))] ?? before.ids[0])[0];
  return earlier ? Math.min(trace.shared(earlier), Math.max(trace.prompt - 1, 0)) : 0;
}

function show(turn, which, trace) {
  const from = begins(turn, trace);
  if (from === null) return null;
  const body = turn.bodies[which], shown = new TokenView(trace, from);
  if (from) {
    const fold = make("button", { type: "button", class: "fold" }, `Show ${from} earlier tokens`);
    fold.addEventListener("click", () => {
      turn.unfolded = true;
      fold.remove();
      shown.reset(0);
      paintTokens([trace]);
    });
    body.tokens.append(fold);
  }
  if (trace.choice && !turn.watched) body.tokens.append(make("h3", {}, `choice ${trace.choice}`));
  if (body.named.hidden && (turn.ids.length > 1 || steered(trace))) {
    body.named.replaceChildren(inline(steered(trace) || "without"));
    body.named.hidden = false;
  }
  body.tokens.append(shown.root);
  views.set(trace.internalId, shown);
  return shown;
}

// Adds what came, as much as a frame allows; returns whether something is left for the next one.
export function paintTokens(traces = []) {
  let budget = BUDGET;
  for (const trace of traces) waiting.add(trace);
  const anew = fit(waiting);
  for (const trace of [...waiting]) {
    const turn = turns.find((one) => one.ids.some((id) => isOf(trace, id)));
    const which = turn?.ids.findIndex((id) => isOf(trace, id));
    const shown = turn && trace.tokens.length ? views.get(trace.internalId) ?? show(turn, which, trace) : null;
    if (!shown) { waiting.delete(trace); continue; }   // it will change again before it can be shown
    turn.bodies[which].plain.hidden = true;
    const left = shown.left();
    if (shown.append(budget) === 0) waiting.delete(trace);
    budget = Math.max(0, budget - left);
    busy(turn, !isOver(turn));
    describe(turn);
  }
  if (anew) recolour();
  return waiting.size > 0;
}

export function recolour() {
  fit(allViews().map((one) => one.trace));
  for (const one of views.values()) one.colour();
}

export function mark() {
  for (const one of views.values()) one.mark(focus.feature);
}

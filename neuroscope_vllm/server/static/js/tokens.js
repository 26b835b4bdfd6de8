// The tokens of one trace as spans, in blocks that the browser leaves out while they are off screen;
// those far off are coloured and marked when they come near.

import { about } from "./about.js";
import { level, value } from "./colour.js";
import { make, visible } from "./dom.js";

const BLOCK = 128, NEAR_PX = 1500;

const nearing = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    target.near = isIntersecting;
    if (isIntersecting && target.stale) target.view.paint(target);
  }
}, { rootMargin: `${NEAR_PX}px` });

export class TokenView {
  spans = [];            // by token, from `from` on
  root = make("div", { class: "tokens", role: "group" });
  #blocks = [];
  #block = null;         // the one that grows
  #notes = 0;
  #feature = null;       // [layer, index] whose tokens are outlined

  constructor(trace, from = 0) {
    this.trace = trace;
    this.root.view = this;
    this.root.setAttribute("aria-label", `tokens of ${trace.requestId}`);
    this.reset(from);
  }

  reset(from) {
    this.from = from;
    this.told = this.trace.told;
    this.spans = [];
    for (const block of this.#blocks) nearing.unobserve(block);
    this.#blocks = [];
    this.#block = null;
    this.#notes = this.trace.notes.findIndex((note) => note.at >= from);
    if (this.#notes < 0) this.#notes = this.trace.notes.length;
    this.root.replaceChildren();
  }

  span(at) {
    return this.spans[at - this.from];
  }

  // How many tokens are not shown yet.
  left() {
    return this.trace.tokens.length - this.from - (this.told === this.trace.told ? this.spans.length : 0);
  }

  // Adds at most so many tokens; returns how many are left.
  append(budget) {
    if (this.told !== this.trace.told) this.reset(this.from);
    const { tokens } = this.trace;
    let at = this.from + this.spans.length;
    for (const end = Math.min(tokens.length, at + budget); at < end; at++) {
      this.#tell(at);
      this.#add(at, tokens[at]);
    }
    if (at === tokens.length) this.#tell(at);
    return tokens.length - at;
  }

  #tell(at) {
    const { notes } = this.trace;
    for (; notes[this.#notes]?.at <= at; this.#notes++) {
      const { text, title } = notes[this.#notes];
      this.#into().append(make("span", { class: "remark", title: title && visible(title) }, ` ${visible(text)} `));
    }
  }

  #into() {
    if (!this.#block) {
      this.#block = Object.assign(make("div", { class: "block" }), { view: this, spans: [], near: true, stale: false });
      this.#blocks.push(this.#block);
      this.root.append(this.#block);
      nearing.observe(this.#block);
    }
    return this.#block;
  }

  #add(at, token) {
    const span = document.createElement("span");
    span.textContent = visible(token.text).replaceAll("\n", "⏎\n");   // nothing: see the style sheet
    span.className = token.prompt ? "t prompt" : "t";
    if (!token.text) { span.classList.add("part"); span.title = "part of a character"; }
    span.at = at;
    this.#look(span);
    this.spans.push(span);
    const block = this.#into();
    block.append(span);
    // A block is a line of its own, so it ends where the text does, if that is soon.
    const full = block.spans.push(span);
    if (full >= BLOCK && (token.text.includes("\n") || full >= 1.5 * BLOCK)) this.#block = null;
  }

  #look(span) {
    const { trace } = this, now = level(value(trace, span.at)), special = about.special.has(trace.tokens[span.at].id);
    if (span.special !== special) span.classList.toggle("special", span.special = special);
    const hit = this.#feature !== null && trace.layers.get(this.#feature[0])?.activationAt(span.at, this.#feature[1]) > 0;
    if (Boolean(span.hit) !== hit) span.classList.toggle("hit", span.hit = hit);
    if (span.level === now) return;
    span.level = now;
    if (now) span.dataset.level = now;
    else delete span.dataset.level;
  }

  paint(block) {
    block.stale = false;
    for (const span of block.spans) this.#look(span);
  }

  colour() {
    for (const block of this.#blocks) {
      if (block.near) this.paint(block);
      else block.stale = true;
    }
  }

  // Outline the tokens that a feature fires on; null: none.
  mark(feature) {
    if (String(feature) === String(this.#feature)) return;
    this.#feature = feature;
    this.colour();
  }
}

// The trace and token an event in the transcript is about; null: none.
export function tokenOf(target) {
  if (target.at === undefined) return null;
  return { view: target.closest(".tokens").view, at: target.at };
}

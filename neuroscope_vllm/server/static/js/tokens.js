// The tokens of one trace as spans, in blocks that the browser leaves out while they are off screen.

import { about } from "./about.js";
import { level, value } from "./colour.js";
import { make, visible } from "./dom.js";

const BLOCK = 128;

export class TokenView {
  spans = [];            // by token, from `from` on
  root = make("div", { class: "tokens", role: "group" });
  #block = null;
  #inBlock = 0;
  #notes = 0;
  #marked = [];

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
    this.#block = null;
    this.#marked = [];
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
      this.root.append(this.#block = make("div", { class: "block" }));
      this.#inBlock = 0;
    }
    return this.#block;
  }

  #add(at, token) {
    const span = document.createElement("span");
    span.textContent = visible(token.text).replaceAll("\n", "⏎\n") || "·";
    span.className = token.prompt ? "t prompt" : "t";
    if (!token.text) { span.classList.add("part"); span.title = "part of a character"; }
    span.at = at;
    this.#look(span, at);
    this.spans.push(span);
    this.#into().append(span);
    // A block is a line of its own, so it ends where the text does, if that is soon.
    if (++this.#inBlock >= BLOCK && (token.text.includes("\n") || this.#inBlock >= 1.5 * BLOCK)) this.#block = null;
  }

  #look(span, at) {
    const now = level(value(this.trace, at)), special = about.special.has(this.trace.tokens[at].id);
    if (span.special !== special) span.classList.toggle("special", span.special = special);
    if (span.level === now) return;
    span.level = now;
    if (now) span.dataset.level = now;
    else delete span.dataset.level;
  }

  colour() {
    this.spans.forEach((span, i) => this.#look(span, this.from + i));
  }

  // Outline the tokens that a feature fires on.
  mark(layer, index) {
    for (const span of this.#marked) span.classList.remove("hit");
    this.#marked = index === null ? [] : this.spans.filter((span) =>
      this.trace.layers.get(layer)?.activationAt(span.at, index) > 0);
    for (const span of this.#marked) span.classList.add("hit");
  }
}

// The trace and token an event in the transcript is about; null: none.
export function tokenOf(target) {
  if (target.at === undefined) return null;
  return { view: target.closest(".tokens").view, at: target.at };
}

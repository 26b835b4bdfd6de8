// Making elements. What comes from a server goes into the document as text, never as markup.

export const $ = (id) => document.getElementById(id);

// make("button", {class: "x", onclick: f, "aria-pressed": true}, "text", node, …)
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false && !name.startsWith("aria-")) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true && !name.startsWith("aria-") ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Newlines stay, so that text keeps its shape; other control and format characters are named, but
// for the joiners that scripts and emoji need.
export const visible = (text) => text
  .replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (c) =>
    "\n\t\u200c\u200d".includes(c) ? c : `\\u{${c.codePointAt(0).toString(16)}}`);

// On one line, for headings and lists.
export const inline = (text) => visible(text).replaceAll("\n", "⏎");

export const number = (value) => value === null || value === undefined ? "–" : Number(value.toPrecision(3)).toString();

export const percent = (value) => value === null || value === undefined ? "–" : `${number(100 * value)} %`;

// Not replaced where it says the same already, so that screen readers are not told twice.
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// The status line, which screen readers read out, too: what holds, and for a while what happened.
const TOLD_MS = 6000;
let holds = "", telling = 0;

export function status(text) {
  holds = text;
  if (!telling) say($("state"), text);
}

export function tell(text) {
  clearTimeout(telling);
  telling = setTimeout(() => { telling = 0; say($("state"), holds); }, TOLD_MS);
  say($("state"), text);
}

let timer;
// For screen readers alone; of several in a row only the last.
export function speak(text) {
  clearTimeout(timer);
  timer = setTimeout(() => say($("said"), text), 300);
}

// Features over time: a canvas, one line a feature, one column a token (or several, where they do not fit).

import { $, make } from "./dom.js";
import { ranked } from "./filters.js";
import { focus } from "./focus.js";
import { schedule } from "./paint.js";
import { nameOf } from "./rows.js";
import { layersOf } from "./side.js";
import { keyOf, partsOf } from "./names.js";
import { view } from "./state.js";

const LINES = 10, LINE_PX = 18;
let lines = [];          // [layer, index]
let width = 0;           // CSS pixels; asking the canvas would lay out the page in every frame
let colours = null;

// The cursor's colour, and the tokens' nine levels from 1 on, read from the scale so that both agree.
function palette() {
  return colours ??= [getComputedStyle($("strip-canvas")).color,
    ...[...$("scale").children].map((step) => getComputedStyle(step).backgroundColor)];
}

export function listenToStrip() {
  new ResizeObserver(([{ contentRect }]) => {
    width = contentRect.width;
    schedule(paintStrip);
  }).observe($("strip-canvas"));
  for (const media of ["(prefers-color-scheme: dark)", "(forced-colors: active)"]) {
    matchMedia(media).addEventListener("change", () => { colours = null; schedule(paintStrip); });
  }
}

export function paintStrip() {
  const { trace } = focus;
  $("strip").hidden = !trace?.tokens.length || view.table !== "";
  if ($("strip").hidden || view.strip) return;
  const among = view.pin.map(partsOf), top = ranked(trace, layersOf(trace), LINES).map((one) => [one.layer, one.index]);
  const keys = new Set(among.map(String));
  const wanted = [...among, ...top.filter((one) => !keys.has(String(one)))].slice(0, Math.max(LINES, among.length));
  // Names are kept while they are pointed at.
  if (String(wanted) !== String(lines) && !$("strip-names").matches(":hover")) {
    lines = wanted;
    $("strip-names").replaceChildren(...lines.map(([layer, index]) => {
      const row = make("li", { class: "row" }, make("button",
        { type: "button", class: "feature", "aria-pressed": view.pin.includes(keyOf(layer, index)) }, nameOf(layer, index), ` [${index}]`));
      row.feature = [layer, index];
      return row;
    }));
  }
  if (width >= 1 && $("scale").childElementCount) draw(trace);
}

function draw(trace) {
  const canvas = $("strip-canvas"), scale = devicePixelRatio || 1;
  const height = lines.length * LINE_PX, tokens = trace.tokens.length;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.setProperty("height", `${height}px`);
  }
  const context = canvas.getContext("2d"), steps = palette();
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  const columns = Math.min(tokens, Math.floor(width)), step = Math.min(width / columns, 14);
  lines.forEach(([layer, index], line) => {
    const best = strongest(trace, layer, index, columns), most = Math.max(...best);
    for (let column = 0; column < columns; column++) {
      if (!(best[column] > 0)) continue;
      context.fillStyle = steps[Math.max(1, Math.ceil(9 * best[column] / most))];
      context.fillRect(column * step, line * LINE_PX + 1, Math.max(1, step - (step > 3 ? 1 : 0)), LINE_PX - 2);
    }
  });
  if (focus.at >= 0) {
    context.fillStyle = steps[0];
    context.fillRect(Math.floor(focus.at * columns / tokens) * step, 0, 1, height);
  }
  canvas.step = step;
  canvas.columns = columns;
  canvas.setAttribute("aria-label", `${lines.length} features over ${tokens} tokens; the table shows the same in words`);
}

function strongest(trace, layer, index, columns) {
  const best = new Float32Array(columns), data = trace.layers.get(layer), tokens = trace.tokens.length;
  for (let i = 0, at = 0; data && at < tokens; at++) {
    const from = data.start[at] ?? 0, to = from + (data.count[at] ?? 0);
    for (i = from; i < to; i++) {
      if (data.index[i] !== index) continue;
      const column = Math.floor(at * columns / tokens);
      best[column] = Math.max(best[column], data.activation[i]);
    }
  }
  return best;
}

// The token below the pointer: the strongest of its column on this line. null: none.
export function tokenUnder(event) {
  const canvas = $("strip-canvas"), { trace } = focus, box = canvas.getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left) / canvas.step), tokens = trace?.tokens.length ?? 0;
  if (!tokens || column < 0 || column >= canvas.columns) return null;
  const [layer, index] = lines[Math.floor((event.clientY - box.top) / LINE_PX)] ?? [];
  let found = Math.ceil(column * tokens / canvas.columns);
  for (let at = found, best = 0; at < tokens && Math.floor(at * canvas.columns / tokens) === column; at++) {
    const here = trace.layers.get(layer)?.activationAt(at, index) ?? 0;
    if (here > best) { best = here; found = at; }
  }
  return found;
}

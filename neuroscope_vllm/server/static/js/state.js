// What is looked at, and its copy in the URL's fragment, which never leaves the browser.

const DEFAULTS = {
  watch: "all",         // "mine": my chat alone; else the id of one more request
  turn: [],             // my requests, each "id", or "id~id" where two answers stand side by side
  layer: "",            // "": the first; "all": side by side
  colour: "",           // "": surprise; else a feature, "20:6091"
  pin: [],
  token: "",            // the pinned one, "<internal id>@<position>"
  sort: "surprise",
  dense: "",            // "show"
  special: "",          // "show"
  table: "",            // "show"
  strip: "",            // "hide"
  card: "",             // the feature whose card is open
  find: "",             // what was last searched for
  by: "",               // "text": by what fires on it
};

// What a URL may say; the rest is left out as if it were not there.
const FEATURE = /^\d{1,4}:\d{1,9}$/;
const VALID = {
  watch: /./, turn: /^[^~]+(~[^~]+)?$/, layer: /^(\d{1,4}|all)$/, colour: FEATURE, pin: FEATURE, token: /^.+@\d{1,9}$/,
  sort: /^(surprise|activation|frequency)$/, dense: /^show$/, special: /^show$/, table: /^show$/, strip: /^hide$/,
  card: FEATURE, find: /./, by: /^text$/,
};

export const view = structuredClone(DEFAULTS);
const listeners = [];

// `listener(changed)` with the names that changed, and whether the browser's buttons did it.
export function onView(listener) {
  listeners.push(listener);
}

function announce(changed, navigated) {
  for (const listener of listeners) listener(changed, navigated);
}

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

// `push`: the browser's Back button comes back to what was.
export function set(patch, push = false) {
  const changed = new Set(Object.keys(patch).filter((name) => !same(view[name], patch[name])));
  if (!changed.size) return;
  Object.assign(view, patch);
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(view)) {
    if (same(value, DEFAULTS[name])) continue;
    for (const one of [value].flat()) query.append(name, one);
  }
  history[push ? "pushState" : "replaceState"](null, "", "#" + query);
  announce(changed, false);
}

function read() {
  const query = new URLSearchParams(location.hash.slice(1)), changed = new Set();
  for (const [name, usual] of Object.entries(DEFAULTS)) {
    const said = [...new Set(query.getAll(name))].filter((one) => VALID[name].test(one));
    const value = Array.isArray(usual) ? said : said[0] ?? usual;
    if (!same(value, view[name])) changed.add(name);
    view[name] = value;
  }
  return changed;
}

read();
addEventListener("popstate", () => {
  const changed = read();
  if (changed.size) announce(changed, true);
});

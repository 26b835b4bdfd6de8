// Taking a request along: as a command, as a program, as JSON, as a page of its own.

import { get } from "./api.js";
import { $, make, tell } from "./dom.js";
import { newId, sent } from "./sent.js";

const here = () => new URL(".", location.href).href.replace(/\/$/, "");
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// Whoever sends it again sends another request: two of one name would be told as one.
const again = () => newId("again");

export function asCurl(id) {
  const record = sent.get(id), name = record ? again() : id;
  const stream = `curl -N ${quoted(`${here()}/v1/features/stream?${new URLSearchParams({ request_id: name })}`)}`;
  if (!record) return stream;
  return `curl ${quoted(`${here()}/v1/chat/completions`)} -H 'Content-Type: application/json' \\\n`
    + `  -H 'X-Request-Id: ${name}' -d ${quoted(JSON.stringify(record.body))}\n${stream}`;
}

// JSON is a Python literal but for these three words.
const python = (value) => JSON.stringify(value, null, 2).replace(/"(?:[^"\\]|\\.)*"|\b(?:true|false|null)\b/g,
  (word) => ({ true: "True", false: "False", null: "None" })[word] ?? word);

export function asPython(id) {
  const record = sent.get(id), name = JSON.stringify(record ? again() : id);
  if (!record) {
    return `import neuroscope_vllm\n\nclient = neuroscope_vllm.Client(${JSON.stringify(here())})\n`
      + `for event in client.stream(${name}):\n    print(event)\n`;
  }
  const { stream, vllm_xargs, ...body } = record.body;
  const extra = vllm_xargs ? `, extra_body={"vllm_xargs": ${python(vllm_xargs)}}` : "";
  return `import neuroscope_vllm\nimport openai\n\nchat = openai.OpenAI(base_url=${JSON.stringify(`${here()}/v1`)}, api_key="none")\n`
    + `answer = chat.chat.completions.create(\n  **${python(body)},\n  extra_headers={"X-Request-Id": ${name}}${extra})\n`
    + `print(answer.choices[0].message.content)\n`
    + `for token in neuroscope_vllm.Client(${JSON.stringify(here())}).trace(${name}).tokens:\n    print(token)\n`;
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    tell(`copied as ${what}`);
  } catch {   // not allowed here: let it be copied by hand
    const close = make("button", { type: "button", onclick: () => $("note").close() }, "Close");
    $("note").replaceChildren(make("h2", { id: "note-title" }, what), make("pre", { tabindex: 0 }, text), close);
    $("note").showModal();
  }
}

function download(name, content, type) {
  const link = make("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function json(turn) {
  try {
    const kept = await Promise.all(turn.ids.map((id) => get(`v1/requests/${encodeURIComponent(id)}`)));
    const choices = kept.flatMap((one) => one.choices);
    download(`${turn.ids.join("~")}.json`, JSON.stringify({ choices }), "application/json");
  } catch (error) { tell(error.message); }
}

export function menu(turn) {
  const each = (what, act) => turn.ids.map((id, i) => make("button",
    { type: "button", onclick: () => act(id) }, turn.ids.length > 1 ? `${what} (${i ? "right" : "left"})` : what));
  const pages = turn.ids.map((id, i) => make("a", { href: `export/${encodeURIComponent(id)}`, download: `${id}.html` },
    turn.ids.length > 1 ? `Page (${i ? "right" : "left"})` : "Page"));
  const box = make("details", { class: "menu" }, make("summary", {}, "Copy, export"), make("div", {},
    ...each("Copy as curl", (id) => copy(asCurl(id), "curl")), ...each("Copy as Python", (id) => copy(asPython(id), "Python")),
    make("button", { type: "button", onclick: () => json(turn) }, "JSON"), ...pages));
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !box.open) return;
    box.open = false;
    box.querySelector("summary").focus();
  });
  box.addEventListener("click", (event) => { if (event.target.closest("button, a")) box.open = false; });
  return box;
}

// A menu closes when something else is chosen.
export function listenToMenus() {
  addEventListener("pointerdown", ({ target }) => {
    for (const box of document.querySelectorAll(".menu[open]")) if (!box.contains(target)) box.open = false;
  });
}

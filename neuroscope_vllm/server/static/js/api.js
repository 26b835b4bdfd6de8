// Talking to the side process. Addresses are relative: the page works behind a path, too.

import { reach } from "./sign.js";

async function failure(answer) {
  let said = "";
  try {
    const { error } = await answer.json();
    said = typeof error === "string" ? error : error?.message;
  } catch { /* no JSON: its status is all there is */ }
  const problem = new Error(said || `the server answers ${answer.status}`);
  problem.status = answer.status;
  return problem;
}

export async function get(path) {
  const answer = await reach(path);
  if (!answer.ok) throw await failure(answer);
  return answer.json();
}

export async function post(path, body, { id, signal } = {}) {
  const headers = { "Content-Type": "application/json" };
  if (id) headers["X-Request-Id"] = id;
  const answer = await reach(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!answer.ok) throw await failure(answer);
  return answer;
}

// {event, id, data} of each server-sent event. fetch in place of EventSource: it says why it failed.
export async function* sse(answer) {
  let rest = "";
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part; !(part = await reader.read()).done;) {
    const blocks = (rest + part.value.replaceAll("\r\n", "\n")).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = {};
      for (const line of block.split("\n")) {
        const at = line.indexOf(": ");
        if (at > 0) event[line.slice(0, at)] = line.slice(at + 2);
      }
      if (event.data) yield event;
    }
  }
}

const pause = (ms, signal) => new Promise((done) => {
  const timer = setTimeout(done, ms);
  signal.addEventListener("abort", () => { clearTimeout(timer); done(); });
});

// Events of one request until it is over, or of all (`request_id` null) until `signal`; comes back
// after what it last saw when the connection breaks. `take(name, event, id)`, `heard(state)`.
export async function follow(requestId, { take, heard, signal }) {
  const query = requestId === null ? "" : "?" + new URLSearchParams({ request_id: requestId });
  for (let last = "", wait = 500; !signal.aborted;) {
    try {
      const answer = await reach("v1/features/stream" + query, { signal, headers: last ? { "Last-Event-ID": last } : {} });
      if (answer.status === 204) return;
      if (!answer.ok) throw await failure(answer);
      heard("live");
      wait = 500;
      for await (const { event, id, data } of sse(answer)) {
        last = id ?? last;
        take(event, JSON.parse(data), id);
      }
    } catch (error) {
      if (signal.aborted) return;
      heard(error.status ? `stream: ${error.message}` : "reconnecting…");
      if (error.status === 403) return;   // no key of this kind may ever
      wait = Math.min(wait * 2, 10_000);
    }
    // A stream that ended well is asked once more, and answers 204.
    await pause(wait === 500 ? 50 : wait, signal);
  }
}

// Signing in where the server asks for a key. The key goes into a session, whose cookie no script can read.

import { $, make, say, tell } from "./dom.js";

let asking = null, declined = false, signedIn = false;

async function said(answer) {
  try {
    const { error } = await answer.json();
    return typeof error === "string" ? error : error.message;
  } catch { return ""; }
}

// fetch, but where a key is wanted it is asked for, and then it goes on. Who declined is not asked
// again by what the page does by itself.
export async function reach(path, options = {}) {
  for (;;) {
    const answer = await fetch(path, options);
    if (answer.status !== 401 || declined && options.method === undefined) return answer;
    const why = await said(answer.clone());   // not after looking: several may be refused at once
    asking ??= ask(why).finally(() => { asking = null; });
    if (!await asking) return answer;
  }
}

// Whether a key was given that the server takes.
function ask(why) {
  const key = make("input", { id: "key", type: "password", autocomplete: "current-password", required: true });
  const secret = make("input", { id: "stream-secret", type: "password", autocomplete: "off" });
  const wrong = make("p", { class: "remark", role: "alert" });
  const form = make("form", {}, make("h2", { id: "sign-title" }, "This server asks for a key"), make("p", { class: "quiet" }, why),
    make("label", {}, "key ", key), make("label", {}, "secret of a request, if it has one ", secret), wrong,
    make("button", {}, "Sign in"), make("button", { type: "button", onclick: () => $("sign-in").close() }, "Not now"));
  $("sign-in").replaceChildren(form);
  $("sign-in").showModal();
  return new Promise((done) => {
    let taken = false;
    $("sign-in").addEventListener("close", () => { declined = !taken; paintSign(); done(taken); }, { once: true });
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const problem = await begin(key.value, secret.value);
      say(wrong, problem);
      if (problem) return key.select();
      taken = true;
      $("sign-in").close();
    });
  });
}

async function begin(key, secret) {
  const body = { api_key: key, ...(secret ? { stream_secret: secret } : {}) };
  try {
    const headers = { "Content-Type": "application/json" };
    const answer = await fetch("v1/session", { method: "POST", headers, body: JSON.stringify(body) });
    return answer.ok ? "" : await said(answer) || `the server answers ${answer.status}`;
  } catch (error) { return error.message; }
}

// `session`: whether the server says that there is one.
export function paintSign(session = signedIn) {
  signedIn = session;
  $("sign").hidden = !session && !declined;
  say($("sign"), session ? "Sign out" : "Sign in");
}

export function listenToSign() {
  $("sign").addEventListener("click", async () => {
    if (signedIn) {
      await fetch("v1/session", { method: "DELETE" });
      location.reload();
      return;
    }
    declined = false;
    tell((await reach("v1/features/describe")).ok ? "signed in" : "not signed in");
  });
}

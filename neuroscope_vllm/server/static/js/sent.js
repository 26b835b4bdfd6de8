// What was sent, for resending, editing and copying. In this tab only: a URL names requests, the
// server keeps their tokens.
export const sent = {
  get: (id) => JSON.parse(sessionStorage.getItem(`neuroscope.${id}`) ?? "null"),
  set: (id, record) => {
    try { sessionStorage.setItem(`neuroscope.${id}`, JSON.stringify(record)); } catch { /* full: no resending */ }
  },
};

export const newId = (kind = "page") => `${kind}-` + [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

// The page's own questions to the model are nobody's request.
const PROBE = "page-try";
export const newProbe = () => newId(PROBE);
export const isProbe = (requestId) => requestId.startsWith(`cmpl-${PROBE}-`);

// One paint per animation frame, whatever comes in; none while the page is hidden.

const jobs = new Set();
let asked = false;

export function schedule(job) {
  jobs.add(job);
  if (asked) return;
  asked = true;
  requestAnimationFrame(run);
}

function run() {
  asked = false;
  const now = [...jobs];
  jobs.clear();
  for (const job of now) {
    try { job(); } catch (error) { console.error(error); }
  }
}

// At most every `ms`, and once more at the end.
export function seldom(job, ms) {
  let last = -Infinity, timer = 0;
  return () => {
    const left = last + ms - performance.now();
    if (timer) return;
    const go = () => { timer = 0; last = performance.now(); schedule(job); };
    if (left <= 0) go();
    else timer = setTimeout(go, left);
  };
}

// The transcript stays at its end while answers grow, unless somebody scrolled up.

import { $ } from "./dom.js";

const NEAR_PX = 80;
let stuck = true, top = 0;

const pane = () => getComputedStyle($("work")).overflowY === "auto" ? $("work") : document.scrollingElement;

export function toEnd() {
  stuck = true;
  const box = pane();
  box.scrollTop = box.scrollHeight;
}

export function toTurn(element) {
  stuck = false;
  element.scrollIntoView();
}

export function toToken(span) {
  stuck = false;
  span?.scrollIntoView({ block: "center" });
}

export function listenToScroll() {
  const moved = () => {
    const box = pane();
    if (box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_PX) stuck = true;
    else if (box.scrollTop < top - 2) stuck = false;
    top = box.scrollTop;
  };
  $("work").addEventListener("scroll", moved, { passive: true });
  document.addEventListener("scroll", moved, { passive: true });
  // Only where the transcript scrolls by itself: a page that moves as a whole moves under the finger.
  new ResizeObserver(() => { if (stuck && pane() === $("work")) toEnd(); }).observe($("turns"));
  new ResizeObserver(() => { if (stuck && pane() === $("work")) toEnd(); }).observe($("work"));
}

// How far to trust what is shown: the SAE's own figures, and what the server warns of.

import { about, shown } from "./about.js";
import { $, make, number, percent, say } from "./dom.js";

function figures(layer) {
  const test = about.tests.find((one) => one.layer === layer && one.l0 !== null && one.l0 !== undefined);
  if (!test) return `layer ${layer}: no self-test figures`;
  const expected = test.expected_l0 ? ` (expected ${number(test.expected_l0)})` : "";
  return `layer ${layer}: L0 ${number(test.l0)}${expected}, ${percent(test.explained_variance)} of variance explained`;
}

// Who chats here should know what is kept.
function recording({ rate, days, redact }) {
  const share = rate < 1 ? `${percent(rate)} of requests are` : "Requests are";
  const kept = days ? `kept for ${days} ${days === 1 ? "day" : "days"}` : "kept";
  return `${share} recorded${redact === "text" ? " without their texts" : ""} and ${kept}`;
}

export function paintTrust() {
  say($("model"), about.model);
  say($("recorded"), about.recording ? `● ${recording(about.recording)}` : "");
  say($("trust"), about.sites.length ? shown().map(figures).join(" · ") : "");
  $("trust").title = about.sites.map((site) => `${site.sae.source}, ranked by ${site.ranking}`).join("\n");
  const told = [...about.problems, ...about.warnings, ...about.tests.map((test) => test.warning).filter(Boolean)];
  const lines = [...new Set(told)];
  if ($("warnings").dataset.lines === JSON.stringify(lines)) return;
  $("warnings").dataset.lines = JSON.stringify(lines);
  $("warnings").replaceChildren(...lines.map((line) => make("p", { class: "remark" }, line)));
}

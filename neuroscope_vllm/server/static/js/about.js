// What the server says of itself: model, layers, SAEs, how far to trust them.

import { get } from "./api.js";
import { view } from "./state.js";

export const about = { model: "", sites: [], special: new Set(), tests: [], warnings: [], problems: [],
  recording: null, guide: [], armed: false, access: { keys: false, lists: true, session: false } };
const EVERY_MS = 15_000, SOON_MS = 2_000;

export const layers = () => about.sites.map((site) => site.layer);

// Those that are shown; of `among` where no worker has said yet what there is.
export function shown(among = []) {
  const all = about.sites.length ? layers() : among;
  if (view.layer === "all") return all;
  const chosen = Number(view.layer);
  return view.layer !== "" && all.includes(chosen) ? [chosen] : all.slice(0, 1);
}

// Asks until the server is ready, and then now and again; `told` is called with each answer.
export async function watchServer(told, failed) {
  for (;;) {
    try {
      if (!document.hidden) {
        const said = await get("v1/features/describe");
        about.model = said.model;
        about.sites = said.sites;
        about.special = new Set(said.special_token_ids);
        about.tests = said.senders.flatMap((sender) => sender.self_test ?? []);
        about.warnings = said.warnings;
        about.problems = said.problems;
        about.recording = said.recording;
        about.guide = said.guide;
        about.armed = said.armed;
        about.access = said.access;
        told();
      }
    } catch (error) { failed(error); }
    await new Promise((done) => setTimeout(done, about.armed ? EVERY_MS : SOON_MS));
  }
}

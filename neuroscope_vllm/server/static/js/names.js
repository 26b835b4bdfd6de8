// What features are called: as the stream tells, and else as the server answers.

import { get } from "./api.js";

const names = new Map();       // "20:6091" -> {label, unreliable, dense}
const asked = new Set();

export const keyOf = (layer, index) => `${layer}:${index}`;
export const partsOf = (key) => key.split(":").map(Number);
export const known = (layer, index) => names.get(keyOf(layer, index));

export function learn(layer, index, { label = null, unreliable = false, dense }) {
  const key = keyOf(layer, index), had = names.get(key);
  if (!had) names.set(key, { label, unreliable, dense });
  else if (dense !== undefined) had.dense = dense;
}

// Ask for those that nothing has told yet; `told` is called when there is an answer.
export async function lookUp(keys, told) {
  for (const key of keys) {
    if (names.has(key) || asked.has(key)) continue;
    asked.add(key);
    const [layer, index] = partsOf(key);
    try {
      const { data } = await get(`v1/features/labels?${new URLSearchParams({ layer, index, limit: 1 })}`);
      if (!data.length) continue;
      learn(layer, index, { label: data[0].text, unreliable: data[0].unreliable });
      told();
    } catch { asked.delete(key); }
  }
}

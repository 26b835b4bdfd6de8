"""Which features a text has, and what they mean: cell by cell, in a notebook or as a script.

Editors that know `# %%` cells run these one by one; in Jupyter, paste them. A server must run, for
example `neuroscope demo`.
"""

# %% Connect
import os
from collections import defaultdict
from pathlib import Path

from neuroscope_vllm import Client

client = Client(os.environ.get("FEATURES_URL", "http://127.0.0.1:8081"))
text = os.environ.get(
    "TEXT", "The bridge fell into the river because the rain had washed away its feet."
)

# %% Let the model read a text; `client.trace(id)` is the same for a chat that was answered
trace = client.inspect(text)
print(trace)  # a notebook shows it, coloured, where a cell ends with `trace`; so does trace.show()

# %% The strongest features of the text
layer = trace.tokens[0].layer
for one in trace.top(8, layer):
    print(f"{one.score:6.1f}  {one.token!r:12} [{one.index}] {one.label or 'unlabelled'}")

# %% Features that several tokens share
where: dict[int, list[str]] = defaultdict(list)
for token in trace.tokens:
    for feature in token.top_features:
        if token.layer == layer and not feature.dense:
            where[feature.index].append(token.token)
for index, tokens in sorted(where.items(), key=lambda item: -len(item[1]))[:5]:
    print(f"[{index}] on {len(tokens)} tokens: {', '.join(map(repr, tokens[:6]))}")

# %% What one of them means: its card
strongest = trace.top(1, layer)[0]
card = client.features.get(strongest.index, strongest.layer)
print(f"\n[{card.index}] {card.label.text if card.label else 'unlabelled'}")
if card.density is not None:
    print(f"fires on {card.density:.2%} of ordinary tokens, at most {card.max:.1f}")
if card.promoted:
    print("promotes", ", ".join(repr(one.token) for one in card.promoted[:6]))
for near in (card.neighbours or [])[:3]:
    print(f"near [{near.index}] {near.label or 'unlabelled'} (cosine {near.cosine:.2f})")
for what, why in card.missing.items():
    print(f"no {what}: {why}")

# %% Which other features are said to be of something
for label in client.features.search("river", layer=layer, limit=3):
    print(f"[{label.index}] {label.text} (by {label.labeller})")

# %% A page to keep or to mail; it needs no network
print("\nwrote", trace.save(Path(os.environ.get("PAGE", "trace.html"))))

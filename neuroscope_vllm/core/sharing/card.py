"""The README of a dataset repository: front matter for the hub, and where everything comes from."""

from __future__ import annotations

import yaml

from neuroscope_vllm.core.labels import clean_label
from neuroscope_vllm.core.sharing.package import Manifest, labels_path

_INTRODUCTION = """# Sparse-autoencoder features: calibrations and labels

Made by neuroscope-vllm, which streams the features of every token that vLLM serves. To use it
with a model:

```bash
neuroscope pull MODEL --from {repo}
```

Labels are one parquet file for each SAE and labeller, with `index` (the feature), `text`,
`labeller`, and, where known, `score`, `method`, `model`, `created` and more. Calibrations
(safetensors) hold, per feature, firings, moments, maximum and a histogram of its activations.
"""


def render_card(repo: str, manifest: Manifest) -> str:
    """The card of a repository, from its manifest alone."""
    configs = [
        {"config_name": f"{key}--{labeller}", "data_files": labels_path(entry.sae, labeller)}
        for key, entry in sorted(manifest.saes.items())
        for labeller in sorted(entry.labels)
    ]
    front = {"tags": ["sparse-autoencoder", "interpretability", "neuroscope"]}
    front |= {"license": manifest.license} if manifest.license else {}
    front |= {"configs": configs} if configs else {}
    parts = ["---", yaml.safe_dump(front, sort_keys=True).strip(), "---", ""]
    parts.append(_INTRODUCTION.format(repo=repo))
    for key, entry in sorted(manifest.saes.items()):
        parts += [f"## {_plain(key)}", "", f"- SAE: `{entry.sae}`, commit `{entry.commit}`"]
        parts.append(f"- {entry.width} features, layer {entry.layer}, of {_plain(entry.model)}")
        if (measured := entry.calibration) is not None:
            corpus = f" of {_plain(measured.corpus)}" if measured.corpus else ""
            parts.append(f"- calibration: {measured.tokens} tokens{corpus}, {measured.created}")
        if entry.labels:
            parts += ["", "| labeller | labels | method | model |", "|---|---|---|---|"]
        for labeller, labels in sorted(entry.labels.items()):
            cells = (labeller, str(labels.count), *map(_list, (labels.methods, labels.models)))
            parts.append(f"| {' | '.join(map(_plain, cells))} |")
        parts.append("")
    return "\n".join(parts)


def _list(values: list[str]) -> str:
    return ", ".join(values) or "not recorded"


def _plain(text: str | None) -> str:
    """Text from files, as text in Markdown."""
    kept = clean_label(text or "not recorded")
    return "".join(f"\\{char}" if char in "|`<>[]*\\" else char for char in kept)

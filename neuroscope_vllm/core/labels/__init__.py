"""What features mean, in words: see `label`. Torch-free."""

from neuroscope_vllm.core.labels.label import (
    MAX_LABEL_CHARS,
    RELIABLE_SCORE,
    Label,
    LabelSet,
    NoLabels,
    Summary,
    clean_label,
    labels_of,
    load_labels,
    one_labeller,
    preference,
    stored_labels,
)

__all__ = [
    "MAX_LABEL_CHARS",
    "RELIABLE_SCORE",
    "Label",
    "LabelSet",
    "NoLabels",
    "Summary",
    "clean_label",
    "labels_of",
    "load_labels",
    "one_labeller",
    "preference",
    "stored_labels",
]

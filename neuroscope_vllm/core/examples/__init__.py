"""Where features fire in a corpus: the examples that labels are written from and scored on.

`collect` gathers them; what reads them is torch-free.
"""

from neuroscope_vllm.core.examples.records import Collection, Context, Example, FeatureSummary
from neuroscope_vllm.core.examples.store import ExampleStore, find_examples, write_examples

__all__ = [
    "Collection",
    "Context",
    "Example",
    "ExampleStore",
    "FeatureSummary",
    "find_examples",
    "write_examples",
]

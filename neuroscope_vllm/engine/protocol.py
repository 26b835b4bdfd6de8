"""What every engine can do for the commands that read many texts. Both engines serve it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from neuroscope_vllm.core.passes import Pass
from neuroscope_vllm.core.sae.info import SAEInfo

Chunk = Sequence[Sequence[int]]
"""Token sequences that run together."""


class Engine(Protocol):
    """A model that runs token sequences, with an SAE on each observed layer.

    Attributes:
        model: Name or folder of the model.
        identity: What else decides the numbers: engine, version, model files, dtype, flags.
        sites: The SAE that reads each observed layer.
        sae_input: What the SAEs read, `raw` or `rms`.
        max_tokens: Longest sequence it runs.
        tokenizer: The model's own, with transformers' interface (`encode`, `decode`,
            `all_special_ids`, `apply_chat_template`).
    """

    model: str
    identity: str
    sites: dict[int, SAEInfo]
    sae_input: str
    max_tokens: int
    tokenizer: Any

    def run(self, what: Pass, sequences: Chunk) -> dict[int, bytes]:
        """Run each sequence through the model once, from position 0, and gather `what`.

        Every token's row is seen exactly once. The same sequences in the same order give the same
        result to the bit on the same machine.

        Args:
            what: The pass; its `read` decodes the result of a layer.
            sequences: Token ids, special tokens included, each of 1 to `max_tokens`.

        Returns:
            The result of each observed layer.

        Raises:
            EngineError: The engine failed. What earlier runs returned stands.
        """
        ...

    def run_each(
        self, what: Callable[[], Pass], chunks: Iterable[Chunk]
    ) -> Iterator[dict[int, bytes]]:
        """`run` of one chunk after another; results in their order.

        Args:
            what: Called when a chunk is about to run, which may be before the results of those
                before it are there.
            chunks: Taken as they are needed.
        """
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...

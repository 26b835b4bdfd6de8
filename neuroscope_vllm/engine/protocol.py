"""What engines can do for the commands that read texts, and for those that patch runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from neuroscope_vllm.core.passes import Pass
from neuroscope_vllm.core.patching.swap import Replacement
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


class PatchEngine(Protocol):
    """A whole model whose residuals can be read and replaced; it knows nothing of SAEs.

    Attributes:
        model, identity, max_tokens, tokenizer: As of an `Engine`.
        num_layers: Decoder layers.
        d_model: Size of the residual stream.
    """

    model: str
    identity: str
    num_layers: int
    d_model: int
    max_tokens: int
    tokenizer: Any

    def residuals(self, sequences: Chunk, layers: Sequence[int]) -> list[dict[int, Tensor]]:
        """resid_post of every position, by layer, of each sequence: float32 [n, d_model].

        Args:
            sequences: Token ids from position 0, each of 1 to `max_tokens`.
            layers: Zero-indexed, each below `num_layers`.

        Raises:
            EngineError: The engine failed.
        """
        ...

    def patched(
        self, sequences: Chunk, edits: Sequence[Sequence[Replacement]], tokens: Sequence[int]
    ) -> Tensor:
        """What comes next, of sequences that are run with some residuals replaced.

        Args:
            sequences: As above; they may run together, and share what is the same.
            edits: Of each sequence, in order; the replacements of one are at places of their own
                and act on that sequence alone. Without any it runs as it is.
            tokens: Those whose log-probability is wanted.

        Returns:
            float32 [sequences, tokens] on the CPU, after the last position of each.

        Raises:
            EngineError: The engine failed.
        """
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...

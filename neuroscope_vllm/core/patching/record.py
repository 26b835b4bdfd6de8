"""What activation patching found: the record that `neuroscope patch --json` prints. Torch-free."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

Kind = Literal["residual", "features"]
Direction = Literal["denoising", "noising"]


class Prompt(msgspec.Struct, kw_only=True):
    """A prompt as the model reads it.

    Attributes:
        text: As given; with a chat template, the user's message.
        token_ids: Special tokens included.
        tokens: Their texts; of a character split over tokens, the last one has it, the others "".
    """

    text: str
    token_ids: list[int]
    tokens: list[str]


class Answer(msgspec.Struct, kw_only=True):
    """A token that may come next."""

    text: str
    token_id: int


class Column(msgspec.Struct, frozen=True, kw_only=True):
    """A position of the patched run.

    Attributes:
        position: In the prompt that is patched.
        source: The position of the other prompt that is put there; None: there is none that
            corresponds, and it is not patched.
    """

    position: int
    source: int | None


class Row(msgspec.Struct, kw_only=True):
    """Patches of one layer.

    Attributes:
        layer: Zero-indexed; its resid_post is replaced.
        features: Those that are patched; None: the whole residual, or of kind `features` all.
        metric: Logit difference with each column patched alone, in the record's order of columns;
            None where it has no source.
        recovered: Likewise.
        metric_of_all, recovered_of_all: With all columns that have a source patched at once.
    """

    layer: int
    features: list[int] | None
    metric: list[float | None]
    recovered: list[float | None]
    metric_of_all: float
    recovered_of_all: float


class Source(msgspec.Struct, kw_only=True):
    """An SAE whose features are patched, a hub's at its commit; `digest` is of its weights."""

    layer: int
    sae: str
    digest: str


class Patching(msgspec.Struct, kw_only=True):
    """One sweep over layers and positions.

    A patch puts activations of one prompt's run (the source) into the other's, at positions of one
    layer:

        residual  the source's resid_post takes the place of the run's
        features  x + sum_i (f_i(source) - f_i(x)) d_i over the SAE's features; what the SAE does
                  not explain stays the run's own

    x is the residual of the unpatched run there. No run is patched at two layers, so that is also
    what it would be but for the patch.

    Attributes:
        clean, corrupted: The prompts.
        answer, wrong: The tokens whose logits are compared: metric = logit(answer) - logit(wrong).
        metric_of_clean, metric_of_corrupted: Without any patch.
        direction: `denoising` puts the clean run into the corrupted one, and recovered is 0 where
            that does nothing; `noising` the corrupted into the clean one, and it is 1.
        kind: What is put there.
        columns: Positions of the prompt that is patched.
        rows: Ascending by layer, then feature.
        chat: Whether the prompts went through the chat template.
        model: Folder or hub id.
        backend: What ran it, `vllm` or `transformers`.
        engine: What else decides the numbers: versions, model files, dtype, flags.
        sae_input: What the SAEs read, `raw` or `rms`; None of whole residuals.
        saes: By layer; none of whole residuals.
    """

    clean: Prompt
    corrupted: Prompt
    answer: Answer
    wrong: Answer
    metric_of_clean: float
    metric_of_corrupted: float
    direction: Direction
    kind: Kind
    columns: list[Column]
    rows: list[Row]
    chat: bool
    model: str
    backend: str
    engine: str
    sae_input: str | None
    saes: list[Source]

    @property
    def into(self) -> Prompt:
        """The prompt whose run is patched."""
        return self.corrupted if self.direction == "denoising" else self.clean

    @property
    def source(self) -> Prompt:
        return self.clean if self.direction == "denoising" else self.corrupted

    @property
    def untouched(self) -> float:
        """What a patch without effect recovers."""
        return 0.0 if self.direction == "denoising" else 1.0

    def strongest(self) -> list[Cell]:
        """All patches of one position, by the size of their effect, largest first."""
        cells = [
            Cell(row, column, value)
            for row in self.rows
            for column, value in zip(self.columns, row.recovered, strict=True)
            if value is not None
        ]
        return sorted(cells, key=lambda cell: -abs(cell.recovered - self.untouched))


class Cell(NamedTuple):
    """A patch of one position."""

    row: Row
    column: Column
    recovered: float

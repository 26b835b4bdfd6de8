"""From all that fired on a text, as an engine lists it, to what is shown of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.events import Feature
from neuroscope_vllm.core.inspection.record import Site, Token, Tracked
from neuroscope_vllm.core.labels import Label, LabelSet
from neuroscope_vllm.core.passes import TokenFeatures
from neuroscope_vllm.core.ranking import make_ranker
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.core.sae.observed import calibration_of


class Inspector:
    """Ranks and names the features of one layer, as a server with the same settings does.

    Attributes:
        site: What is shown, for the record.
        calibrated: Whether the SAE has a calibration; without one, sinks are not recognised.
    """

    def __init__(
        self,
        settings: Settings,
        number: int,
        layer: int,
        info: SAEInfo,
        labels: Sequence[LabelSet],
        special_ids: Collection[int],
    ) -> None:
        """
        Args:
            number: Which of `settings.sae` it is, from 0.
            layer, info: Of that SAE.
            labels: Those that are preferred first.
            special_ids: Tokens that are no text, and are given no features.

        Raises:
            ConfigError: A calibration is wrong, or a ranking needs one and there is none.
        """
        source = settings.sae[number]
        found = calibration_of(settings, number, info)
        calibration = found[1] if found else None
        ranking = settings.ranking_of(calibration is not None)
        self.site = Site(layer=layer, sae=source, ranking=ranking, top_k=settings.top_k)
        self.calibrated = calibration is not None
        self._ranker = make_ranker(ranking, calibration, settings.max_frequency, width=info.width)
        self._width = info.width
        self._sink_norm = calibration.sink_norm if calibration else float("inf")
        self._labels = labels
        self._special = torch.tensor(sorted(special_ids), dtype=torch.int64)

    def check(self, features: Iterable[int]) -> None:
        """Raises ConfigError if one of these is none of the SAE's."""
        for index in features:
            if not 0 <= index < self._width:
                raise ConfigError(
                    f"feature {index} does not exist; SAE {self.site.sae} has {self._width:,}"
                    f" features, numbered 0 to {self._width - 1}."
                )

    def tokens(self, listed: TokenFeatures, texts: Sequence[str]) -> list[Token]:
        """The tokens of one sequence, whose texts are given, with their best features."""
        score = self._ranker.score(listed.feature[None], listed.activation[None])[0]
        score = score.masked_fill(self._ranker.mask[listed.feature], float("-inf"))
        special, sink = self._special_and_sinks(listed)
        found = []
        for at, text in enumerate(texts):
            start, stop = int(listed.start[at]), int(listed.start[at + 1])
            hidden = bool(special[at] | sink[at])
            top = [] if hidden else self._top(listed, score, start, stop)
            found.append(
                Token(
                    position=at,
                    token=text,
                    token_id=int(listed.token_id[at]),
                    layer=self.site.layer,
                    top_features=top,
                    l0=None if special[at] else stop - start,
                    features_at=None if special[at] else "self",
                    sink=bool(sink[at]),
                    special=bool(special[at]),
                )
            )
        return found

    def firings(
        self, listed: TokenFeatures, features: Iterable[int]
    ) -> dict[int, list[tuple[int, float]]]:
        """Where each of these features fires in one sequence: positions and activations there.

        On special tokens and sinks nothing does.
        """
        special, sink = self._special_and_sinks(listed)
        row = torch.arange(len(special)).repeat_interleave(listed.start.diff())
        wanted = torch.isin(listed.feature, torch.tensor(sorted(features), dtype=torch.int64))
        kept = (wanted & ~(special | sink)[row]).nonzero().squeeze(1)
        found: dict[int, list[tuple[int, float]]] = {int(index): [] for index in features}
        values = _shortest(listed.activation[kept])
        columns = listed.feature[kept].tolist(), row[kept].tolist(), values
        for index, position, value in zip(*columns, strict=True):
            found[index].append((position, value))
        return found

    def tracked(
        self, index: int, firings: Iterable[tuple[int, float]], tokens: Sequence[Token]
    ) -> Tracked:
        """A feature on every one of this layer's `tokens`, given where it fires."""
        at = dict(firings)
        activations = [
            None if token.special or token.sink else at.get(token.position, 0.0) for token in tokens
        ]
        label = self._label(index)
        return Tracked(
            layer=self.site.layer,
            index=index,
            label=label and label.text,
            activations=activations,
            unreliable=label is not None and label.unreliable,
        )

    def _special_and_sinks(self, listed: TokenFeatures) -> tuple[Tensor, Tensor]:
        """bool [n] each; a special token is no sink."""
        special = torch.isin(listed.token_id, self._special)
        return special, (listed.norm > self._sink_norm) & ~special

    def _top(self, listed: TokenFeatures, score: Tensor, start: int, stop: int) -> list[Feature]:
        """Best score first, of the features that fired at [start, stop)."""
        best = score[start:stop].topk(min(self.site.top_k, stop - start))
        shown = best.indices[best.values > float("-inf")] + start
        columns = (
            listed.feature[shown].tolist(),
            *map(_shortest, (listed.activation[shown], score[shown])),
        )
        return [self._feature(*found) for found in zip(*columns, strict=True)]

    def _feature(self, index: int, activation: float, points: float) -> Feature:
        label = self._label(index)
        if label is None:
            return Feature(index, None, activation, points)
        return Feature(index, label.text, activation, points, unreliable=label.unreliable)

    def _label(self, index: int) -> Label | None:
        found = (labels.get(index) for labels in self._labels)
        return next((label for label in found if label is not None), None)


def _shortest(values: Tensor) -> list[float]:
    """Doubles that print as the shortest decimal of the float32, as in a server's events."""
    return [float(text) for text in values.numpy().astype("U")]

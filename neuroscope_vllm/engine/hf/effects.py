"""What taking features out of one layer does to those of a later one, with transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neuroscope_vllm.core.calibration import SINK_MULTIPLE
from neuroscope_vllm.core.causal.pair import Pair
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.sae.info import check_fits
from neuroscope_vllm.core.sae.sparse import encode_sparse
from neuroscope_vllm.engine.hf.hooks import at_layer
from neuroscope_vllm.engine.hf.loading import decoder_layers, load_whole
from neuroscope_vllm.engine.protocol import Chunk

BATCH = 8
"""Features that are taken out at a time, each in a run of its own."""


class Survey(NamedTuple):
    """What fires in some sequences as they are.

    Attributes:
        sink_norms: Residual norms of either layer, above which a token is a sink.
        lower, upper: int64 [width], tokens that each feature of either layer fires on, sinks and
            special tokens left out.
        tokens: How many there are.
    """

    sink_norms: tuple[float, float]
    lower: Tensor
    upper: Tensor
    tokens: int


class Effects(NamedTuple):
    """Means over all tokens, of r features taken out by all of the later layer.

    Attributes:
        preactivation: float64 [r, upper width], by how much a feature's was higher with the other
            in place: positive where that one excites it.
        activation: float64 [r, upper width], likewise.
    """

    preactivation: Tensor
    activation: Tensor


class FeatureAblator:
    """A model cut off above the later layer of a pair, float32 on the CPU.

    Attributes:
        tokenizer: The model's.
    """

    def __init__(self, model: str, pair: Pair) -> None:
        """
        Raises:
            ConfigError: transformers is not installed, or the model can not be loaded.
            SAEError: The SAEs are of another model.
        """
        whole, self.tokenizer = load_whole(model)
        layers = decoder_layers(whole, model)
        size = whole.config.get_text_config().hidden_size
        for layer, sae in ((pair.lower_layer, pair.lower), (pair.upper_layer, pair.upper)):
            check_fits(sae.info, d_model=size, num_layers=len(layers), layer=layer)
        del layers[pair.upper_layer + 1 :]
        self._pair = pair
        self._decoder = whole.get_decoder()
        self._special = torch.tensor(self.tokenizer.all_special_ids)
        self._lower, self._upper = layers[pair.lower_layer], layers[pair.upper_layer]

    @torch.inference_mode()
    def survey(self, sequences: Chunk) -> Survey:
        """
        Args:
            sequences: Of token ids, from position 0. Their residuals are held, 8 bytes a number.

        Raises:
            ConfigError: They have no token that is not special.
        """
        states = [self._states(torch.tensor([list(sequence)]), None) for sequence in sequences]
        lower = torch.cat([one[0] for one in states])
        upper = torch.cat([one[1][0] for one in states])
        ids = torch.tensor([token for sequence in sequences for token in sequence])
        ordinary = ~torch.isin(ids, self._special)
        if not bool(ordinary.any()):
            raise ConfigError("the text for ablations has no ordinary token; give running text.")
        norms = [torch.linalg.vector_norm(rows[ordinary], dim=1) for rows in (lower, upper)]
        first, second = (SINK_MULTIPLE * float(norm.median()) for norm in norms)
        counted = (norms[0] <= first) & (norms[1] <= second)
        fired = [
            torch.bincount(encode_sparse(sae, rows[ordinary][counted]).feature, minlength=sae.width)
            for sae, rows in ((self._pair.lower, lower), (self._pair.upper, upper))
        ]
        return Survey((first, second), fired[0], fired[1], int(counted.sum()))

    @torch.inference_mode()
    def measure(
        self,
        sequences: Chunk,
        features: Sequence[int],
        survey: Survey,
        on_sequence: Callable[[], object] = lambda: None,
    ) -> Effects:
        """Take each feature out of every token it fires on, `x -= f_i(x) W_dec[i]`.

        The SAE's error stays, and all that the layers between make of the change counts, on the
        same and on later tokens. Special tokens and sinks are neither edited nor counted.

        Args:
            sequences: Those of the survey.
            features: Of the earlier layer.
        """
        pair, chosen = self._pair, torch.tensor(features)
        shape = (len(chosen), pair.upper.width)
        preactivation = torch.zeros(shape, dtype=torch.float64)
        activation = torch.zeros(shape, dtype=torch.float64)
        for sequence in sequences:
            ids = torch.tensor([list(sequence)])
            lower, upper = self._states(ids, None)
            counted = ~torch.isin(ids[0], self._special)
            for state, limit in zip((lower, upper[0]), survey.sink_norms, strict=True):
                counted &= torch.linalg.vector_norm(state, dim=1) <= limit
            there = torch.where(counted[:, None], pair.lower.encode(lower)[:, chosen], 0.0)
            clean = _total(pair, upper[0][counted])
            for some in (there > 0).any(0).nonzero().squeeze(1).split(BATCH):
                removed = there[:, some].t()[:, :, None] * pair.lower.W_dec[chosen[some]][:, None]
                _, edited = self._states(ids, removed)
                for row, states in zip(some.tolist(), edited, strict=True):
                    without = _total(pair, states[counted])
                    preactivation[row] += clean[0] - without[0]
                    activation[row] += clean[1] - without[1]
            on_sequence()
        return Effects(preactivation / survey.tokens, activation / survey.tokens)

    def _states(self, ids: Tensor, removed: Tensor | None) -> tuple[Tensor, Tensor]:
        """(the earlier layer's residual [n, d_model], the later one's [b, n, d_model]).

        Args:
            ids: [1, n].
            removed: [b, n, d_model], each taken from the earlier layer in a run of its own; the
                layers below, which are the same in all, run once.
        """
        found: list[Tensor] = []

        def edit(hidden: Tensor) -> Tensor | None:
            found.append(hidden[0].float())
            return None if removed is None else hidden - removed

        def keep(hidden: Tensor) -> None:
            found.append(hidden.float())

        with at_layer(self._lower, edit), at_layer(self._upper, keep):
            self._decoder(input_ids=ids, use_cache=False)
        return found[0], found[1]


def _total(pair: Pair, states: Tensor) -> tuple[Tensor, Tensor]:
    """(pre-activations, activations) summed over rows [n, d_model], each float64 [upper width]."""
    pre, active = pair.upper.preactivations(states)
    fired = torch.where(active, pre, 0.0)
    return pre.sum(0, dtype=torch.float64), fired.sum(0, dtype=torch.float64)

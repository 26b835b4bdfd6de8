"""What `neuroscope trace` reads and finds."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from neuroscope_vllm.cli.corpus_options import take_corpus
from neuroscope_vllm.cli.demo import demo_model
from neuroscope_vllm.cli.engines import DEMO, open_engine
from neuroscope_vllm.cli.options import settings_from
from neuroscope_vllm.cli.progress import progress
from neuroscope_vllm.cli.supervise import console
from neuroscope_vllm.core.causal import INPUTS, OUTPUTS, Graph, JointFirings, Pair, strongest
from neuroscope_vllm.core.causal.edges import TWERA, WEIGHT, Edges
from neuroscope_vllm.core.causal.graph import graph_of
from neuroscope_vllm.core.causal.pair import check_pair
from neuroscope_vllm.core.causal.store import (
    Observation,
    firings_file,
    load_firings,
    save_firings,
)
from neuroscope_vllm.core.causal.tokens import written_tokens
from neuroscope_vllm.core.corpus import Corpus
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.sae import load_sae
from neuroscope_vllm.core.sae.canonical import SUITE
from neuroscope_vllm.core.sae.observed import named, observed

CORPUS_OPTIONS = ("source", "subset", "split", "column", "revision", "samples", "max_tokens")
SAE_OPTIONS = ("sae", "layer", "sae_input", "config")


class TraceJob:
    """
    Attributes:
        model: Folder or hub id; None: none was given.
        pair: The two SAEs.
        measured: What both did on the same tokens; None: nobody looked.
        texts: The options of the corpus.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        """
        Args:
            options: Those of the engine and of the corpus.

        Raises:
            NeuroscopeError, click.ClickException: One sentence each.
        """
        self.texts = {name: options.pop(name) for name in CORPUS_OPTIONS}
        corpus = take_corpus(dict(self.texts)) if self.texts["source"] is not None else None
        self.model: str | None = options["model"]
        if self.model == DEMO:
            self.model = str(demo_model())
        self.pair = self._pair({name: options[name] for name in SAE_OPTIONS})
        if corpus is not None:
            self._measure(corpus, options)
        path = firings_file(self.pair)
        self.measured = load_firings(path, self.pair) if path.is_file() else None

    def _pair(self, flags: dict[str, Any]) -> Pair:
        settings = settings_from(flags)
        if SUITE in settings.sae and self.model is None:
            raise click.UsageError(f"--sae {SUITE} needs a MODEL, whose SAEs are then meant.")
        settings = named(settings, self.model or "")
        infos = observed(settings)
        lower, upper = check_pair(infos, settings.sae_input)
        with console.status("loading the SAEs"):
            saes = {
                layer: load_sae(source) for layer, source in zip(infos, settings.sae, strict=True)
            }
        return Pair(saes[lower], saes[upper], lower, upper)

    def _measure(self, corpus: Corpus, options: dict[str, Any]) -> None:
        """Watch both layers over the corpus, and keep what fired."""
        from neuroscope_vllm.engine.joint_firings import joint_firings

        with contextlib.closing(open_engine(max_tokens=corpus.max_tokens, **options)) as engine:
            with progress(corpus.samples) as report:
                firings, done, left_out = joint_firings(engine, corpus, report)
            observation = Observation(
                lower_digest=self.pair.lower.digest,
                upper_digest=self.pair.upper.digest,
                model=engine.model,
                corpus=corpus.describe(),
                created=done.created,
                sequences=done.sequences,
                tokens=firings.tokens,
                left_out=left_out,
            )
        path = firings_file(self.pair)
        try:
            save_firings(path, firings, observation)
        except OSError as error:
            raise click.ClickException(
                f"{path} can not be written ({error.strerror}); make room, or set NEUROSCOPE_DATA"
                " to another folder."
            ) from None
        console.print(
            f"neuroscope: watched {firings.tokens:,} tokens,"
            f" {path.stat().st_size / 2**20:,.0f} MiB in {path}"
        )

    def graph(
        self,
        features: Sequence[tuple[int, int]],
        top: int,
        by: str | None,
        max_cosine: float | None,
    ) -> Graph:
        """
        Args:
            features: (layer, index); of none, the strongest edges of all pairs.
            by: None: the best there is.

        Raises:
            ConfigError: There is no such feature, or nothing to weight edges by.
        """
        by = by or (TWERA if self.measured else WEIGHT)
        if by != WEIGHT and self.measured is None:
            raise ConfigError(
                f"edges can not be ordered by {by}: it is not known what both SAEs do on the same"
                " tokens; measure it with a MODEL and --corpus, or use --by weight."
            )
        edges = self._edges(list(dict.fromkeys(features)), top, by, max_cosine)
        tokens = None
        if self.model is not None and Path(self.model).is_dir():
            tokens = written_tokens(Path(self.model))
        with console.status("looking up what features mean"):
            return graph_of(
                self.pair,
                edges,
                by=by,
                top=top,
                features=list(dict.fromkeys(features)),
                max_cosine=max_cosine,
                measured=self.measured,
                model=self.model if tokens is not None else None,
                tokens=tokens,
            )

    def _edges(
        self, features: Sequence[tuple[int, int]], top: int, by: str, max_cosine: float | None
    ) -> Edges:
        import torch

        pair = self.pair
        firings: JointFirings | None = self.measured[0] if self.measured else None
        common: dict[str, Any] = {"by": by, "firings": firings, "max_cosine": max_cosine}
        pairs = f"{pair.lower.width:,} x {pair.upper.width:,}"
        with console.status(f"going through {pairs} pairs of features"):
            if not features:
                return strongest(pair, top, **common)
            parts = []
            for layer, index in features:
                one = torch.tensor([self._checked(layer, index)])
                if layer == pair.lower_layer:
                    parts.append(strongest(pair, top, of_each=OUTPUTS, rows=one, **common))
                else:
                    parts.append(strongest(pair, top, of_each=INPUTS, columns=one, **common))
        return Edges.joined(parts)

    def _checked(self, layer: int, index: int) -> int:
        pair = self.pair
        saes = {pair.lower_layer: pair.lower, pair.upper_layer: pair.upper}
        if layer not in saes:
            raise ConfigError(
                f"feature {layer}:{index} is of layer {layer}, but the SAEs read layers"
                f" {pair.lower_layer} and {pair.upper_layer}; ask for a feature of one of these."
            )
        if index >= saes[layer].width:
            raise ConfigError(
                f"feature {layer}:{index} does not exist; the SAE of layer {layer} has features 0"
                f" to {saes[layer].width - 1}."
            )
        return index

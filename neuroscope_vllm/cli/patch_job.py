"""What `neuroscope patch` does: from what was asked for to the record."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import click
import msgspec

from neuroscope_vllm.cli.engines import DEMO, chosen, located
from neuroscope_vllm.cli.progress import counted
from neuroscope_vllm.cli.supervise import console
from neuroscope_vllm.cli.tokenized import check_text, prompt_ids, token_texts
from neuroscope_vllm.core.artefacts import pinned
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.patching.align import aligned, check_aligned, choose, common_start
from neuroscope_vllm.core.patching.metric import check_ends
from neuroscope_vllm.core.patching.plan import Plan, Target
from neuroscope_vllm.core.patching.record import Answer, Kind, Patching, Prompt, Source
from neuroscope_vllm.core.sae.info import check_fits
from neuroscope_vllm.core.sae.load import load_sae
from neuroscope_vllm.core.sae.observed import named, observed
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.engine.patch import ends_of, sweep
from neuroscope_vllm.engine.protocol import PatchEngine
from neuroscope_vllm.engine.spec import Backend, EngineSpec


class PatchOptions(msgspec.Struct, kw_only=True):
    """A sweep; see the options of the command. Lists that are None: all there is."""

    clean: str
    corrupted: str
    answer: str
    wrong: str
    chat: bool
    kind: Kind
    layers: list[int] | None
    positions: list[int] | None
    everywhere: bool
    features: list[int] | None
    each: bool
    noising: bool
    align: bool


class EngineOptions(NamedTuple):
    """What runs it, as in `EngineSpec`."""

    backend: Backend
    vllm_flags: tuple[str, ...]
    device: str
    dtype: str


def run(
    asked: PatchOptions, model: str | None, engine_options: EngineOptions, flags: dict[str, Any]
) -> Patching:
    """On an engine of its own.

    Raises click.ClickException and NeuroscopeError, one sentence each.
    """
    if model is None:
        console.print("no --model given: the embedded demo")
    if asked.kind == "features":
        path, settings = chosen(model or DEMO, flags)
        settings = named(settings, path)
    else:
        path, settings = located(model or DEMO), Settings()
    spec = EngineSpec(model=path, settings=settings, **engine_options._asdict())
    with console.status("loading the model"):
        engine = spec.open_patching()
    with contextlib.closing(engine):
        saes = _load_saes(settings, engine)
        return _run(asked, engine, settings, saes, model or DEMO, engine_options.backend)


def _run(
    asked: PatchOptions,
    engine: PatchEngine,
    settings: Settings,
    saes: dict[int, SAE],
    model: str,
    backend: Backend,
) -> Patching:
    clean, corrupted = (
        _prompt(engine, text, asked.chat, model) for text in (asked.clean, asked.corrupted)
    )
    answer, wrong = (
        _answer(engine, text, option)
        for text, option in ((asked.answer, "--answer"), (asked.wrong, "--wrong"))
    )
    if answer.token_id == wrong.token_id:
        raise ConfigError(f"--answer and --wrong are both the token {answer.text!r}; give two.")
    if not asked.align:
        check_aligned(clean, corrupted)
    into, source = (clean, corrupted) if asked.noising else (corrupted, clean)
    start = 0 if asked.everywhere else common_start(into.token_ids, source.token_ids)
    columns = aligned(into.token_ids, source.token_ids)
    tokens = answer.token_id, wrong.token_id
    ends = ends_of(engine, clean.token_ids, corrupted.token_ids, tokens)
    check_ends(ends, answer.text, wrong.text)
    plan = Plan(_targets(asked, engine, saes), choose(columns, asked.positions, start))
    with counted(len(plan.runs), "patched runs") as report:
        metrics = sweep(engine, into.token_ids, source.token_ids, plan, tokens, saes, report)
    return Patching(
        clean=clean,
        corrupted=corrupted,
        answer=answer,
        wrong=wrong,
        metric_of_clean=ends.clean,
        metric_of_corrupted=ends.corrupted,
        direction="noising" if asked.noising else "denoising",
        kind=asked.kind,
        columns=plan.columns,
        rows=plan.rows(metrics, ends),
        chat=asked.chat,
        model=model,
        backend=backend,
        engine=engine.identity,
        sae_input=settings.sae_input if saes else None,
        saes=[
            Source(layer=layer, sae=pinned(sae.info.source, sae.info.revision), digest=sae.digest)
            for layer, sae in sorted(saes.items())
        ],
    )


def _load_saes(settings: Settings, engine: PatchEngine) -> dict[int, SAE]:
    """By layer. Raises SAEError: One does not fit the model."""
    found: dict[int, SAE] = {}
    for source, (layer, info) in zip(settings.sae, observed(settings).items(), strict=True):
        check_fits(info, d_model=engine.d_model, num_layers=engine.num_layers, layer=layer)
        sae = load_sae(source)
        found[layer] = sae.reading_rms() if settings.sae_input == "rms" else sae
    return found


def _prompt(engine: PatchEngine, text: str, chat: bool, model: str) -> Prompt:
    check_text(text, "the prompt")
    ids = prompt_ids(engine.tokenizer, text, chat, model)
    if not ids:
        raise ConfigError(f"the prompt {text!r} has no tokens; give some text.")
    if len(ids) > engine.max_tokens:
        raise ConfigError(
            f"the prompt {text[:40]!r}… has {len(ids):,} tokens, but {model} takes"
            f" {engine.max_tokens:,}; give a shorter one."
        )
    return Prompt(text=text, token_ids=ids, tokens=token_texts(engine.tokenizer, ids))


def _answer(engine: PatchEngine, text: str, option: str) -> Answer:
    check_text(text, option)
    ids = engine.tokenizer.encode(text, add_special_tokens=False)
    if len(ids) == 1:
        return Answer(text=text, token_id=ids[0])
    if not ids:
        raise ConfigError(f"{option} {text!r} is no token; give a word, with its leading space.")
    parts = token_texts(engine.tokenizer, ids)
    shown = ", ".join(map(repr, parts))
    instead = f"its first, {parts[0]!r}, or another" if parts[0] else "another"
    raise ConfigError(
        f"{option} {text!r} is {len(ids)} tokens ({shown}), and one is compared; give {instead}."
    )


def _targets(asked: PatchOptions, engine: PatchEngine, saes: dict[int, SAE]) -> list[Target]:
    """What is patched, a row each. Raises ConfigError: There is no such layer or feature."""
    there = sorted(saes) if asked.kind == "features" else list(range(engine.num_layers))
    layers = there if asked.layers is None else sorted(set(asked.layers))
    for layer in layers:
        if layer in there:
            continue
        if layer >= engine.num_layers:
            raise ConfigError(
                f"layer {layer} does not exist; {engine.model} has {engine.num_layers} layers,"
                f" numbered 0 to {engine.num_layers - 1}."
            )
        raise click.UsageError(
            f"no SAE reads layer {layer}; give one with --sae, or leave the layer out of --layers."
        )
    if asked.features is None:
        return [Target(layer) for layer in layers]
    features = tuple(sorted(set(asked.features)))
    for layer in layers:
        if features[-1] >= saes[layer].width:
            raise ConfigError(
                f"feature {features[-1]} does not exist; SAE {saes[layer].info.source} has"
                f" {saes[layer].width:,} features, numbered 0 to {saes[layer].width - 1}."
            )
    if asked.each:
        return [Target(layer, (index,)) for layer in layers for index in features]
    return [Target(layer, features) for layer in layers]

"""A run of `neuroscope score`, from its options to what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from neuroscope_vllm.cli.llm_options import open_examples, open_llm, progress, shown_cost
from neuroscope_vllm.cli.supervise import console
from neuroscope_vllm.core import artefacts
from neuroscope_vllm.core.autointerp import classify
from neuroscope_vllm.core.autointerp.explain import shown_from
from neuroscope_vllm.core.autointerp.judgements import Judgement, forget
from neuroscope_vllm.core.autointerp.llm import LLM, Spent, ask_all
from neuroscope_vllm.core.autointerp.prices import prompt_tokens
from neuroscope_vllm.core.autointerp.prompt import read_prompt
from neuroscope_vllm.core.autointerp.questions import Answer
from neuroscope_vllm.core.autointerp.scoring import (
    ANSWER_TOKENS,
    Method,
    ScoreRun,
    make_method,
    missing_methods,
    unscored,
)
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.examples import ExampleStore
from neuroscope_vllm.core.journal import Journal
from neuroscope_vllm.core.labels import Label, LabelSet, labels_of

Wanted = dict[int, tuple[Label, list[Method]]]
"""By feature, the label to score and how."""


def score(
    source: str,
    labeller: str,
    kinds: list[str],
    *,
    prompt: Path | None,
    features: list[int] | None,
    limit: int | None,
    positives: int,
    negatives: int,
    llm_options: dict[str, Any],
    rescore: bool,
    dry_run: bool,
) -> dict[str, Any]:
    """What `--json` prints; the parameters are the options of the command.

    Raises NeuroscopeError, one sentence each.
    """
    store = open_examples(source)
    methods = [
        make_method(
            kind,
            read_prompt(kind, classify.FIELDS, prompt),
            positives,
            negatives,
            store.collection,
        )
        for kind in kinds
    ]
    there, labels = labels_of(source, labeller)
    own = artefacts.home(source) in there.parents  # what ships with an SAE is left as it is
    path = there if own else artefacts.labels_file(source, labeller)
    with contextlib.nullcontext() if dry_run else artefacts.only_writer(path):
        labels = labels_of(source, labeller)[1]
        wanted = _wanted(labels, methods, features, rescore)
        already = sum(1 for label in labels if _is_asked(label, features)) - len(wanted)
        wanted = dict(list(wanted.items())[:limit])
        _check_texts([label for label, _ in wanted.values()], store)
        llm = open_llm(**llm_options)
        about = {"sae": source, "labeller": labeller, "judge": llm.model, "already_scored": already}
        if dry_run:
            return {**about, **_estimate(store, labels, wanted, llm)}
        answers = artefacts.scores_file(source, labeller)
        if rescore:
            _forget(labels, wanted, path, answers)
        if wanted and not path.is_file():
            labels.save(path)
        run, spent = _run(store, labels, wanted, llm, path, answers)
    return {**about, **_summary(run, labels, spent)}


def _forget(labels: LabelSet, wanted: Wanted, path: Path, answers: Path) -> None:
    """Take back the scores of what is to be scored again, and the answers that they rest on.

    From there on it is a run like any other, which goes on where it was stopped.
    """
    kinds = {(i, method.kind) for i, (_, methods) in wanted.items() for method in methods}
    for index, (label, methods) in wanted.items():
        wanted[index] = unscored(label, methods), methods
        labels.add(wanted[index][0])
    for file in (path, answers):
        if old := artefacts.keep_old(file, b""):
            console.print(f"neuroscope: kept what was there as {old}")
    forget(answers, lambda one: (one.feature, one.kind) in kinds)
    labels.save(path)


def _run(
    store: ExampleStore,
    labels: LabelSet,
    wanted: Wanted,
    llm: LLM,
    path: Path,
    answers: Path,
) -> tuple[ScoreRun, Spent]:
    def is_stale(one: Judgement) -> bool:
        if one.feature not in wanted:
            return False
        label, methods = wanted[one.feature]
        names = {method.kind: method.name for method in methods}
        differs = one.judge != llm.model or one.method != names.get(one.kind)
        return one.label != label.text or (one.kind in names and differs)

    known = forget(answers, is_stale)
    spent = Spent()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    with Journal(answers) as kept, Journal(path) as scored, progress(len(wanted)) as report:
        run = ScoreRun(
            store, labels, llm.model, known, scored_on=today, keep=kept.add, finish=scored.add
        )

        def take(answer: Answer) -> None:
            run.take(answer)
            report(run.settled, len(wanted), spent)

        asyncio.run(ask_all(llm, run.questions(wanted.values()), on_answer=take, spent=spent))
    return run, spent


def _wanted(
    labels: LabelSet, methods: Sequence[Method], features: list[int] | None, rescore: bool
) -> Wanted:
    """What is not scored by these methods yet, in the order that was asked for."""
    chosen = list(labels) if features is None else [labels.get(index) for index in features]
    found: Wanted = {}
    for position, label in enumerate(chosen):
        if label is None:
            index = (features or [])[position]
            raise ConfigError(
                f"feature {index} has no label of {labels.labeller!r}; name others with --features."
            )
        todo = list(methods) if rescore else missing_methods(label, methods)
        if todo:
            found[label.index] = label, todo
    return found


def _check_texts(labels: Sequence[Label], store: ExampleStore) -> None:
    """Whether what is held out now was when the labels were written.

    Raises:
        ConfigError: Labels are of other weights.
    """
    weights, texts = store.collection.name.split(".")
    found = [named for label in labels if (named := shown_from(label))]
    if foreign := sum(named[0] != weights for named in found):
        raise ConfigError(
            f"{foreign:,} of these labels were written for other weights than the examples are of;"
            f" label those features again first, with `neuroscope label`."
        )
    if other := sum(named[1] != texts for named in found):
        console.print(
            f"neuroscope: {other:,} of these labels were written from another collection; what is"
            " held out now may have been shown then, so their scores may be too high"
        )


def _is_asked(label: Label, features: list[int] | None) -> bool:
    return features is None or label.index in features


def _estimate(store: ExampleStore, labels: LabelSet, wanted: Wanted, llm: LLM) -> dict[str, Any]:
    """What a run would take."""
    run = ScoreRun(
        store, labels, llm.model, {}, scored_on="", keep=lambda _: None, finish=lambda _: None
    )
    questions = tokens = 0
    for question in run.questions(wanted.values()):
        questions += 1
        tokens += prompt_tokens(question)
    answers = questions * ANSWER_TOKENS
    return {
        "to_score": len(wanted) - len(run.too_few),
        "too_few_texts": run.too_few,
        "questions": questions,
        "prompt_tokens": tokens,
        "answer_tokens": answers,
        "cost": llm.price.of(tokens, answers) if llm.price is not None else None,
    }


def _summary(run: ScoreRun, labels: LabelSet, spent: Spent) -> dict[str, Any]:
    features = []
    for index, scores in sorted(run.scores.items()):
        label = labels.get(index)
        assert label is not None
        measured = {kind: asdict(one) for kind, one in scores.items()}
        shown = {"index": index, "label": label.text, "score": label.score}
        features.append({**shown, "unreliable": label.unreliable, **measured})
    means = [one["score"] for one in features]
    return {
        "scored": len(features),
        "unreliable": sum(one["unreliable"] for one in features),
        "mean_score": sum(means) / len(means) if means else None,
        "too_few_texts": sorted(run.too_few),
        "failed": {str(index): why for index, why in sorted(run.failed.items())},
        "stopped": spent.stopped,
        "cost": shown_cost(spent),
        "spent": asdict(spent),
        "features": features,
    }

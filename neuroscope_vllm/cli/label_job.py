"""What `neuroscope label` does: which features, whose file, and where the labels come from."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroscope_vllm.cli.llm_options import given_price, open_llm, progress, shown_cost
from neuroscope_vllm.cli.supervise import console

if TYPE_CHECKING:
    from neuroscope_vllm.core.autointerp.explain import LabelRun
    from neuroscope_vllm.core.autointerp.llm import LLM, Spent
    from neuroscope_vllm.core.autointerp.questions import Answer, Question
    from neuroscope_vllm.core.examples import ExampleStore
    from neuroscope_vllm.core.journal import Journal

TOKENS = "tokens"
ANSWER_TOKENS = 25
"""Of a label, about."""


class Job:
    """What is to be labelled, by whom, and where the labels go."""

    def __init__(
        self,
        source: str,
        store: ExampleStore,
        *,
        labeller: str | None,
        features: list[int] | None,
        limit: int | None,
        min_examples: int,
        traffic: Path | None,
        relabel: bool,
        prompt: Path | None,
        llm_options: dict[str, Any],
    ) -> None:
        from neuroscope_vllm.core.autointerp.explain import FIELDS
        from neuroscope_vllm.core.autointerp.prompt import read_prompt

        self.source, self.store, self.labeller = source, store, labeller
        self.limit, self.min_examples, self.relabel = limit, min_examples, relabel
        self.llm_options = llm_options
        self.chosen = _chosen(store, features, traffic)
        self.prompt = read_prompt("label", FIELDS, prompt)

    def ask(self) -> dict[str, Any]:
        """Ask a language model about every feature that has no label yet."""
        from neuroscope_vllm.core.autointerp.llm import Spent

        llm, spent = open_llm(**self.llm_options), Spent()
        with self._writing(self._name(llm.model)) as (journal, wanted, already, path):
            run = self._run(path.stem, journal)
            try:
                self._ask(llm, run, wanted, spent)
            except KeyboardInterrupt:
                console.print(f"neuroscope: {run.labelled:,} new labels; {shown_cost(spent)}")
                raise
        return self._result(run, path, already, llm.model, spent)

    def _ask(self, llm: LLM, run: LabelRun, wanted: list[int], spent: Spent) -> None:
        from neuroscope_vllm.core.autointerp.explain import complaint
        from neuroscope_vllm.core.autointerp.llm import ask_all

        most = self.limit or len(wanted)
        questions = itertools.islice(run.questions(wanted), most)
        with progress(min(most, len(wanted))) as report:

            def take(answer: Answer) -> None:
                run.take(answer)
                total = min(most, len(wanted) - len(run.too_few))
                report(run.labelled + len(run.failed), total, spent)

            asyncio.run(ask_all(llm, questions, on_answer=take, complaint=complaint, spent=spent))

    def ingest(self, results: Path) -> dict[str, Any]:
        """Take over what a batch answered."""
        from neuroscope_vllm.core.autointerp.batch import read_answers
        from neuroscope_vllm.core.autointerp.llm import Spent
        from neuroscope_vllm.core.errors import ConfigError

        model = self.llm_options["model"]
        if self.labeller is None and model is None:
            raise click.UsageError("--ingest needs --labeller, or the --model of the batch.")
        price, spent, lines, strange = given_price(self.llm_options), Spent(), 0, 0
        with self._writing(self._name(model or "")) as (journal, wanted, already, path):
            run = self._run(path.stem, journal)
            left = set(wanted)

            def find(key: str) -> Question | None:
                nonlocal lines, strange
                feature = run.feature_of(key)
                lines, strange = lines + 1, strange + (feature is None)
                if feature not in left:
                    return None
                left.remove(feature)
                return next(run.questions([feature]), None)

            for answer in read_answers(results, find, price):
                run.take(answer)
                spent.prompt_tokens += answer.prompt_tokens
                spent.completion_tokens += answer.completion_tokens
                if answer.cost is not None:
                    spent.cost = (spent.cost or 0.0) + answer.cost
            if lines == strange:
                raise ConfigError(
                    f"none of the {lines:,} results in {results} answers a question about these "
                    f"examples with this prompt; give the --sae and --prompt of the batch, and do "
                    f"not collect anew in between."
                )
        return {**self._result(run, path, already, model, spent), "others": strange}

    def write_batch(self, path: Path) -> dict[str, Any]:
        """Write the questions in place of asking them."""
        from neuroscope_vllm.core import artefacts
        from neuroscope_vllm.core.autointerp.batch import request_line

        model = self.llm_options["model"]
        if model is None:
            raise click.UsageError("--batch-file needs --model, as the batch's server knows it.")
        run, questions, already = self._unasked(self._name(model))
        lines = [request_line(question, model) for question in questions]
        artefacts.write_whole(path, b"".join(lines))
        return {
            "sae": self.source,
            "model": model,
            "questions": len(lines),
            "already_labelled": already,
            "too_few_examples": len(run.too_few),
            "file": str(path),
        }

    def estimate(self) -> dict[str, Any]:
        """What it would take to ask."""
        from neuroscope_vllm.core.autointerp.prices import prompt_tokens, worst_case

        llm = open_llm(**self.llm_options)
        run, questions, already = self._unasked(self._name(llm.model))
        count = tokens = 0
        worst = 0.0
        for question in questions:
            count += 1
            tokens += prompt_tokens(question)
            worst += worst_case(question, llm.price) if llm.price is not None else 0.0
        answers = count * ANSWER_TOKENS
        return {
            "sae": self.source,
            "labeller": self._name(llm.model),
            "model": llm.model,
            "to_label": count,
            "already_labelled": already,
            "too_few_examples": len(run.too_few),
            "prompt_tokens": tokens,
            "answer_tokens": answers,
            "cost": None if llm.price is None else llm.price.of(tokens, answers),
            "cost_at_most": None if llm.price is None else worst,
        }

    def label_by_tokens(self) -> dict[str, Any]:
        """Label without a language model."""
        from neuroscope_vllm.core.token_labels import label_by_tokens

        folder = self.llm_options["model"]
        with self._writing(TOKENS) as (journal, wanted, already, path):
            labels = label_by_tokens(
                self.store, self.source, wanted[: self.limit], folder and Path(folder), _today()
            )
            for label in labels:
                journal.add(label)
        return {
            "sae": self.source,
            "labeller": TOKENS,
            "file": str(path),
            "labelled": len(labels),
            "already_labelled": already,
            "without": len(wanted[: self.limit]) - len(labels),
        }

    def _run(self, labeller: str, journal: Journal | None) -> LabelRun:
        from neuroscope_vllm.core.autointerp.explain import LabelRun

        return LabelRun(
            self.store,
            labeller,
            self.prompt,
            keep=journal.add if journal is not None else lambda label: None,
            created=_today(),
            min_examples=self.min_examples,
        )

    def _unasked(self, labeller: str) -> tuple[LabelRun, Iterator[Question], int]:
        """The questions that are left, for who does not write labels."""
        from neuroscope_vllm.core import artefacts
        from neuroscope_vllm.core.autointerp.questions import with_room

        wanted, already = self._wanted(artefacts.labels_file(self.source, labeller))
        run = self._run(labeller, None)
        asked = with_room(run.questions(wanted), self.llm_options["thought_tokens"])
        return run, itertools.islice(asked, self.limit), already

    @contextlib.contextmanager
    def _writing(self, labeller: str) -> Iterator[tuple[Journal, list[int], int, Path]]:
        """The labeller's file, for this process alone; what is left to label; how many have one.

        What ships with the SAE under the same name is carried over: the file would hide it.
        """
        from neuroscope_vllm.cli.labels import place
        from neuroscope_vllm.core import artefacts
        from neuroscope_vllm.core.journal import Journal

        path = place(self.source, labeller)
        with artefacts.only_writer(path):
            wanted, already = self._wanted(path)
            shipped = [p for p in artefacts.find_labels(self.source) if p.name == path.name]
            if wanted and shipped and not path.exists():
                artefacts.write_whole(path, shipped[0].read_bytes())
            try:
                with Journal(path) as journal:
                    yield journal, wanted, already, path
            finally:
                if path.exists() and path.stat().st_size == 0:
                    path.unlink()

    def _wanted(self, path: Path) -> tuple[list[int], int]:
        """The features to label, in order, and how many were left out for having a label."""
        from neuroscope_vllm.core import artefacts
        from neuroscope_vllm.core.autointerp.explain import shown_from
        from neuroscope_vllm.core.labels import load_labels
        from neuroscope_vllm.core.labels.label import NoLabels

        there = [p for p in artefacts.find_labels(self.source) if p.name == path.name]
        known: set[int] = set()
        if there and not self.relabel:
            with contextlib.suppress(NoLabels):
                weights = self.store.collection.name[:8]
                for label in load_labels(there[0]):
                    # After a retraining an index is another feature's.
                    if (shown_from(label) or (weights,))[0] == weights:
                        known.add(label.index)
        wanted = [feature for feature in self.chosen if feature not in known]
        return wanted, len(self.chosen) - len(wanted)

    def _name(self, model: str) -> str:
        if self.labeller is not None:
            return self.labeller
        name = re.sub(r"[^\w.+-]+", "-", model.rstrip("/").rpartition("/")[2])
        return name.lstrip(".+-")[:100] or "model"

    def _result(
        self, run: LabelRun, path: Path, already: int, model: str | None, spent: Spent
    ) -> dict[str, Any]:
        from msgspec.structs import asdict

        return {
            "sae": self.source,
            "labeller": path.stem,
            "model": model,
            "file": str(path),
            "labelled": run.labelled,
            "already_labelled": already,
            "too_few_examples": len(run.too_few),
            "failed": {str(index): why for index, why in sorted(run.failed.items())},
            "stopped": spent.stopped,
            "spent": asdict(spent),
            "cost": shown_cost(spent),
        }


def _chosen(store: ExampleStore, features: list[int] | None, traffic: Path | None) -> list[int]:
    """Features that fire, or those that were named; what traffic shows most comes first."""
    from neuroscope_vllm.core.autointerp.ordering import seen_in_traffic
    from neuroscope_vllm.core.errors import ConfigError

    collected = store.collection
    if features is not None and (last := max(features)) >= collected.width:
        raise ConfigError(
            f"--features names {last}, but {collected.sae} has {collected.width:,} features; "
            f"name smaller ones."
        )
    if features is None:
        features = [one.feature for one in store.features if one.firings]
    if traffic is None:
        return features
    rank = {index: at for at, index in enumerate(seen_in_traffic(traffic, collected.layer))}
    return sorted(features, key=lambda index: rank.get(index, len(rank)))


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()

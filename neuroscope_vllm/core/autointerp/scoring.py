"""Scores labels: asks a judge about each feature's texts, and keeps what came of it. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import msgspec

from neuroscope_vllm.core.autointerp import classify
from neuroscope_vllm.core.autointerp.judged import Text, choose_texts
from neuroscope_vllm.core.autointerp.judgements import Judgement, Known
from neuroscope_vllm.core.autointerp.measures import Accuracy, accuracy
from neuroscope_vllm.core.autointerp.negatives import Negatives
from neuroscope_vllm.core.autointerp.prompt import Prompt
from neuroscope_vllm.core.autointerp.questions import Answer, Question
from neuroscope_vllm.core.examples import Collection, ExampleStore
from neuroscope_vllm.core.labels import Label, LabelSet

TEXTS_A_QUESTION = 5
"""delphi's number: more leak from one to the next."""
ANSWER_TOKENS = 40
"""Of such a question, about."""
_OF_SCORES = (
    *("score", "detection", "fuzzing", "scorer", "scored_on", "scoring", "positives", "negatives"),
)
_VERSION = 1
"""Of how texts are chosen and shown."""


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """One way to score a label.

    Attributes:
        kind: `detection` or `fuzzing`.
        prompt: What the judge is told and asked.
        positives, negatives: Texts of each class, at most.
        name: What `Label.scoring` has it by: kind@digest of the prompt:digest of what decides the
            texts.
    """

    kind: str
    prompt: Prompt
    positives: int
    negatives: int
    name: str


def make_method(
    kind: str, prompt: Prompt, positives: int, negatives: int, collection: Collection
) -> Method:
    # Not when it was collected: the same corpus gives the same texts.
    same = msgspec.structs.replace(collection, created="", sae="", sink_norm=None)
    decides = [_VERSION, TEXTS_A_QUESTION, positives, negatives, same]
    digest = hashlib.sha256(msgspec.json.encode(decides)).hexdigest()[:8]
    name = f"{kind}@{prompt.digest}:{digest}"
    return Method(kind=kind, prompt=prompt, positives=positives, negatives=negatives, name=name)


def missing_methods(label: Label, methods: Iterable[Method]) -> list[Method]:
    """Those that the label was not scored by."""
    done = set((label.scoring or "").split())
    return [method for method in methods if method.name not in done]


def unscored(label: Label, methods: Iterable[Method]) -> Label:
    """The label as it was before it was scored by methods of these kinds."""
    kinds = {method.kind for method in methods}
    names = [n for n in (label.scoring or "").split() if n.partition("@")[0] not in kinds]
    if not names:
        return msgspec.structs.replace(label, **dict.fromkeys(_OF_SCORES))
    return _with_scores(label, dict.fromkeys(kinds), names)


def _with_scores(label: Label, found: Mapping[str, float | None], names: list[str]) -> Label:
    scores = {"detection": label.detection, "fuzzing": label.fuzzing} | dict(found)
    measured = [score for score in scores.values() if score is not None]
    mean = sum(measured) / len(measured) if measured else None
    return msgspec.structs.replace(label, **scores, score=mean, scoring=" ".join(sorted(names)))


class _Pending:
    """A feature whose questions are being asked."""

    def __init__(self, label: Label, methods: Sequence[Method], texts: Sequence[Text]) -> None:
        self.label, self.methods = label, methods
        self.parts = [
            texts[start : start + TEXTS_A_QUESTION]
            for start in range(0, len(texts), TEXTS_A_QUESTION)
        ]
        self.answers: dict[tuple[str, int], list[int]] = {}
        self.left = 0
        self.failure: str | None = None
        self.model: str | None = None

    def measured(self, method: Method) -> Accuracy:
        return accuracy(
            (text.fires, answer)
            for part, texts in enumerate(self.parts)
            for text, answer in zip(texts, self.answers[method.kind, part], strict=True)
        )


class ScoreRun:
    """Scores features one after another, several at a time.

    Attributes:
        scores: By feature and kind, of those that are finished.
        too_few: Features with too few texts to be scored on.
        failed: Features of which a question failed, and why.
    """

    def __init__(
        self,
        store: ExampleStore,
        labels: LabelSet,
        judge: str,
        known: Known,
        *,
        scored_on: str,
        keep: Callable[[Judgement], None],
        finish: Callable[[Label], None],
    ) -> None:
        """
        Args:
            labels: Kept up to date.
            judge: The model that is asked.
            known: Answers that need not be asked for again.
            scored_on: ISO date.
            keep: Called with each answer.
            finish: Called with each label once it is scored, after its answers were kept.
        """
        self.scores: dict[int, dict[str, Accuracy]] = {}
        self.too_few: list[int] = []
        self.failed: dict[int, str] = {}
        self._store, self._labels, self._judge, self._known = store, labels, judge, known
        self._scored_on, self._keep, self._finish = scored_on, keep, finish
        self._contexts = Negatives(store)
        self._pending: dict[int, _Pending] = {}

    @property
    def settled(self) -> int:
        """How many features are done with, well or not."""
        return len(self.scores) + len(self.too_few) + len(self.failed)

    def questions(self, wanted: Iterable[tuple[Label, Sequence[Method]]]) -> Iterator[Question]:
        """What has to be asked to score these, feature by feature."""
        for label, methods in wanted:
            counts = methods[0].positives, methods[0].negatives
            texts = choose_texts(self._store, self._contexts, label.index, *counts)
            if not texts:
                self.too_few.append(label.index)
                continue
            pending = _Pending(label, methods, texts)
            asked = list(self._unanswered(pending))
            pending.left = len(asked)
            self._pending[label.index] = pending
            if asked:
                yield from asked
            else:
                self._settle(pending)

    def take(self, answer: Answer) -> None:
        """An answer to one of the questions, or that there is none."""
        feature, kind, number = answer.key.split("/")
        pending, part = self._pending[int(feature)], int(number)
        if answer.content is None:
            pending.failure = answer.failure
        else:
            texts = pending.parts[part]
            answers = classify.judgements(answer.content, len(texts))
            method = next(method for method in pending.methods if method.kind == kind)
            judgement = Judgement(
                feature=int(feature),
                kind=kind,
                part=part,
                label=pending.label.text,
                method=method.name,
                judge=self._judge,
                model=answer.model,
                texts=[text.id for text in texts],
                hard=[int(text.hard) for text in texts],
                truth=[int(text.fires) for text in texts],
                answer=answers,
            )
            self._keep(judgement)
            self._use(pending, judgement)
        pending.left -= 1
        if not pending.left:
            self._settle(pending)

    def _unanswered(self, pending: _Pending) -> Iterator[Question]:
        """The feature's questions, less those that were answered before."""
        label = pending.label
        for method in pending.methods:
            for part, texts in enumerate(pending.parts):
                known = self._known.get((label.index, method.kind, part))
                if known is not None and known.texts == [text.id for text in texts]:
                    self._use(pending, known)
                else:
                    key = f"{label.index}/{method.kind}/{part}"
                    yield classify.question(key, method.kind, method.prompt, label.text, texts)

    def _use(self, pending: _Pending, judgement: Judgement) -> None:
        pending.answers[judgement.kind, judgement.part] = judgement.answer
        pending.model = judgement.model or judgement.judge

    def _settle(self, pending: _Pending) -> None:
        """Every question of a feature has its answer, or none is to be had."""
        index = pending.label.index
        del self._pending[index]
        if pending.failure is not None:
            self.failed[index] = pending.failure
            return
        scores = {method.kind: pending.measured(method) for method in pending.methods}
        label = self._scored(pending, {kind: one.balanced for kind, one in scores.items()})
        self.scores[index] = scores
        self._labels.add(label)
        self._finish(label)

    def _scored(self, pending: _Pending, found: dict[str, float]) -> Label:
        label = pending.label
        names = {name.partition("@")[0]: name for name in (label.scoring or "").split()}
        names |= {method.kind: method.name for method in pending.methods}
        positives = sum(text.fires for part in pending.parts for text in part)
        return msgspec.structs.replace(
            _with_scores(label, found, list(names.values())),
            scorer=pending.model,
            scored_on=self._scored_on,
            positives=positives,
            negatives=sum(map(len, pending.parts)) - positives,
        )

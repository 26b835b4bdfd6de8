"""Labels features: shows their examples to a language model, and keeps what it says. Torch-free."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec
import numpy as np

from neuroscope_vllm.core.autointerp.classify import written
from neuroscope_vllm.core.autointerp.judged import MARKED_FROM, Text
from neuroscope_vllm.core.autointerp.prompt import Prompt
from neuroscope_vllm.core.autointerp.questions import Answer, Question
from neuroscope_vllm.core.examples import Example, ExampleStore
from neuroscope_vllm.core.examples.records import TOP
from neuroscope_vllm.core.labels import Label
from neuroscope_vllm.core.labels.neuronpedia import sanitise

STRONGEST, SAMPLED = 10, 20
"""Examples of a feature that its labeller sees, at most."""
MAX_LISTED = 10
"""Active tokens listed after an example."""
MAX_TOKENS = 200
FIELDS = {"examples"}
"""What a prompt asks to be filled in."""
SCHEMA = {
    "type": "object",
    "properties": {"label": {"type": "string"}},
    "required": ["label"],
    "additionalProperties": False,
}


def choose_examples(store: ExampleStore, feature: int) -> list[Example]:
    """What a labeller may see of a feature: none that is held out, and no two that overlap.

    Returns:
        The strongest first; then a sample, evenly over the quantiles of the activation, strongest
        first too.
    """
    seen = [example for example in store.of(feature) if not example.held_out]
    taken: dict[int, list[range]] = {}
    strongest = _apart((e for e in seen if e.kind == TOP), taken, STRONGEST)
    sample = _apart((e for e in seen if e.kind != TOP), taken, len(seen))
    sample.sort(key=lambda example: (-example.activation, example.sequence))
    if len(sample) > SAMPLED:
        at = ((np.arange(SAMPLED) + 0.5) * len(sample) / SAMPLED).astype(int)
        sample = [sample[i] for i in at]
    return strongest + sample


def _apart(examples: Iterable[Example], taken: dict[int, list[range]], most: int) -> list[Example]:
    """Those whose texts share no token with one that is taken, which they become."""
    found: list[Example] = []
    for example in examples:
        start = example.position - example.at
        window = range(start, start + len(example.tokens))
        others = taken.setdefault(example.sequence, [])
        apart = all(w.stop <= window.start or window.stop <= w.start for w in others)
        if apart and len(found) < most:
            others.append(window)
            found.append(example)
    return found


def shown(examples: Sequence[Example]) -> str:
    """Examples as a prompt has them, with activations from 0 to 10 of the largest of all."""
    largest = max((max(example.activations) for example in examples), default=0.0)
    lines: list[str] = []
    for number, example in enumerate(examples, start=1):
        least = MARKED_FROM * max(example.activations)
        marked = [value > least for value in example.activations]
        text = Text(id="", fires=True, tokens=example.tokens, marked=marked)
        active = [
            f"{json.dumps(token, ensure_ascii=False)} {math.ceil(10 * value / largest)}"
            for token, value, mark in zip(example.tokens, example.activations, marked, strict=True)
            if mark
        ]
        lines.append(f"Example {number}: {written(text, marks=True)}")
        lines.append(f"Active: {', '.join(active[:MAX_LISTED])}")
    return "\n".join(lines)


def shown_from(label: Label) -> tuple[str, str] | None:
    """The digests of the weights and of the texts (`Collection.name`) that a label was written
    from; None if it does not say."""
    found = re.search(r"of examples (\w{8})\.(\w{8})$", label.method or "")
    return (found[1], found[2]) if found else None


class LabelRun:
    """Labels features one after another, several at a time.

    Attributes:
        labelled: How many have a label now.
        too_few: Features with too few examples, which nobody is asked about.
        failed: Features that got no label, and why.
    """

    def __init__(
        self,
        store: ExampleStore,
        labeller: str,
        prompt: Prompt,
        keep: Callable[[Label], None],
        *,
        created: str,
        min_examples: int = 1,
    ) -> None:
        """
        Args:
            keep: Called with each label.
            created: ISO date.
            min_examples: Features with fewer get no label.
        """
        self.labelled = 0
        self.too_few: list[int] = []
        self.failed: dict[int, str] = {}
        self._store, self._labeller, self._prompt, self._keep = store, labeller, prompt, keep
        self._created, self._min_examples = created, min_examples
        collected = store.collection
        self._method = (
            f"{prompt.name}@{prompt.digest}: {STRONGEST} strongest and {SAMPLED} by quantile of "
            f"examples {collected.name}"
        )
        what = [STRONGEST, SAMPLED, msgspec.structs.replace(collected, sae="")]
        digest = hashlib.sha256(msgspec.json.encode(what)).hexdigest()[:12]
        self._asks = f"label-{digest}-{prompt.digest}-"
        self._examples: dict[int, int] = {}

    def questions(self, features: Iterable[int]) -> Iterator[Question]:
        """What to ask to label these."""
        for feature in features:
            examples = choose_examples(self._store, feature)
            if len(examples) < self._min_examples:
                self.too_few.append(feature)
                continue
            self._examples[feature] = len(examples)
            yield Question(
                key=f"{self._asks}{feature}",
                system=self._prompt.system,
                user=self._prompt.fill(examples=shown(examples)),
                schema=SCHEMA,
                max_tokens=MAX_TOKENS,
            )

    def feature_of(self, key: str) -> int | None:
        """Of a question of this store and prompt; None if the key is of another run's."""
        number = key.removeprefix(self._asks)
        return int(number) if number != key and number.isdecimal() and number.isascii() else None

    def take(self, answer: Answer) -> None:
        """An answer to one of the questions, or that there is none."""
        feature = self.feature_of(answer.key)
        assert feature is not None
        failure = answer.failure
        if answer.content is not None and (failure := complaint(answer.content)) is None:
            self._keep(
                Label(
                    index=feature,
                    text=sanitise(answer.content["label"]) or "",
                    labeller=self._labeller,
                    method=self._method,
                    model=answer.model,
                    created=self._created,
                    examples=self._examples.get(feature),
                )
            )
            self.labelled += 1
            self.failed.pop(feature, None)
        else:
            self.failed[feature] = failure or ""


def complaint(content: dict[str, object]) -> str | None:
    """What is wrong with an answer that fits the schema, in words."""
    text = sanitise(str(content["label"]))
    if text is None:
        return "the label has the prompt or the model's thoughts in it"
    return None if text else "the label is empty"

"""Labels without a language model: what a feature reads, and what it writes.

The `tokens` labeller. A label names the tokens on which the feature fires most strongly, what they
have in common where they do, and after an arrow the tokens that its decoder direction promotes:

    “Paris”, “Rome”, “city” → “of”, “,”
    “order” after “in”, “good”
    “means”, “feed” near “species”
    caus-: “caused”, “cause”, “causing”
    years: “1789”, “1865”

A part of a word has an ellipsis where the word goes on, “encir…”. What a feature reads comes from
what `collect` gathered, what it writes from the weights.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, std_mean

from neuroscope_vllm.core.autointerp.explain import choose_examples
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.examples import Example, ExampleStore
from neuroscope_vllm.core.examples.records import TOP
from neuroscope_vllm.core.labels import Label
from neuroscope_vllm.core.sae import load_sae
from neuroscope_vllm.core.unembedding import read_unembedding

LABELLER = "tokens"
METHOD = "top tokens and promoted tokens"
READ_METHOD = "top tokens"

READ_TOKENS, WRITTEN_TOKENS = 3, 2
COMMON = 0.75
"""Share of the activation that has something in common, for a label to say so."""
STEM, ENDING = 4, 3
"""Letters of a beginning, or an end, that words have in common."""
ENDING_WORDS = 3
"""Words that show that it is the ending."""
NEIGHBOURS = 3
"""Words before the tokens, or after, that a label lists where those are all that stand there."""
NEAR_WORDS, NEAR, USUAL = 2, 0.6, 0.03
"""Words that a label says tokens are near to: at most so many, of so much of the activation, in no
more than such a share of other texts."""
SEEN = 3
"""Times that a token stands in other texts, for a label to say that it is promoted: of those that a
tokenizer never needs, the unembedding is noise."""
CANDIDATES = 40
DIGITS = YEARS, NUMBERS = "years: ", "numbers: "
_SPECIAL = re.compile(r"<unused\d+>|<\|.*\|>|<0x[0-9A-F]{2}>|</?s>|<(pad|bos|eos|unk|mask)>")
_WITHIN = re.compile(r"<unused\d+>|<\|[^|>]*\|>|</?s>|<(?:pad|bos|eos|unk|mask)>")
_WORDS, _BEGIN, _END = re.compile(r"\w+|[^\w\s]"), re.compile(r"\w*"), re.compile(r"\w*\Z")
# A token is promoted when its logit stands this many sigmas above what the largest of as many
# random logits would reach, sqrt(2 ln vocabulary).
PROMOTED_MARGIN = 0.5
LOGIT_ROWS = 64  # features at a time: 64 MiB of logits at Gemma's vocabulary


class Reading(NamedTuple):
    """A token on which a feature fires, as a person reads it.

    Attributes:
        token: As in a label, with an ellipsis where its word goes on.
        word: The word that it is or belongs to.
        before, after: The words, or the marks, around that one; empty where there is none.
        nearby: The other words of its text, in lower case.
        activation: The feature's.
    """

    token: str
    word: str
    before: str
    after: str
    nearby: frozenset[str]
    activation: float


def read(tokens: Sequence[str], at: int, activation: float) -> Reading | None:
    """The token `at` of a text given as the texts of its tokens; None: it is not readable."""
    token = readable(tokens[at])
    if not token:
        return None
    left, text, right = "".join(tokens[:at]), tokens[at], "".join(tokens[at + 1 :])
    left, right = _WITHIN.split(left)[-1], _WITHIN.split(right)[0]
    begun = _END.findall(left)[0] if re.match(r"\w", text) else ""
    rest = _BEGIN.findall(right)[0] if re.search(r"\w\Z", text) else ""
    before = _WORDS.findall(left[: len(left) - len(begun)])
    after = _WORDS.findall(right[len(rest) :])
    return Reading(
        token=f"{'…' if begun else ''}{token}{'…' if rest else ''}",
        word=f"{begun}{token}{rest}",
        before=before[-1] if before else "",
        after=after[0] if after else "",
        nearby=_words([*before, *after]),
        activation=activation,
    )


class Usual(NamedTuple):
    """What texts have, whatever fires in them.

    Attributes:
        words: The share of texts that have a word, in lower case.
        tokens: Those that are seen SEEN times or more.
    """

    words: Mapping[str, float]
    tokens: frozenset[str]

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]]) -> Usual:
        """Texts are those of their tokens."""
        having = Counter(word for text in texts for word in _words(_WORDS.findall("".join(text))))
        tokens = Counter(token for text in texts for token in text)
        return cls(
            {word: count / len(texts) for word, count in having.items()},
            frozenset(token for token, count in tokens.items() if count >= SEEN),
        )


def _words(found: Iterable[str]) -> frozenset[str]:
    return frozenset(word.casefold() for word in found if len(word) > 2 and word.isalpha())


def promoted_tokens(directions: Tensor, unembedding: Tensor, k: int = 10) -> list[list[int]]:
    """Tokens that each decoder direction makes likelier, strongest first; [] if none stands out.

    Args:
        directions: [features, d_model], rows of `W_dec * final_norm_gain`. The norm also divides by
            a number of the token's own, which cannot change the order.
        unembedding: [vocabulary, d_model], W_U by token.
        k: At most so many a feature.
    """
    vocabulary = unembedding.shape[0]
    floor = math.sqrt(2.0 * math.log(vocabulary)) + PROMOTED_MARGIN
    promoted = []
    for block in directions.to(unembedding.dtype).split(LOGIT_ROWS):
        logits = (block @ unembedding.t()).float()
        value, token_id = logits.topk(min(k, vocabulary), dim=1)
        spread, mean = std_mean(logits, dim=1, keepdim=True)
        stands_out = (value - mean) > floor * spread
        rows = zip(token_id.tolist(), stands_out.sum(dim=1).tolist(), strict=True)
        promoted += [ids[:count] for ids, count in rows]
    return promoted


def compose_label(
    top: Sequence[Reading], promoted: Iterable[str] = (), usual: Usual | None = None
) -> str:
    """A label from a feature's tokens.

    Args:
        top: Its strongest examples; a token that recurs weighs more.
        promoted: Tokens its direction promotes, strongest first (`promoted_tokens`).
        usual: Of other texts; None: nothing is said of what they have.

    Returns:
        The label, without an arrow when nothing readable is promoted; empty when nothing is left.
    """
    reads = _reads(top, usual) if top else ""
    written: dict[str, str] = {}
    for token in promoted:
        if (usual is None or token in usual.tokens) and (text := readable(token)):
            written.setdefault(text.casefold(), text)
    writes = _listed(list(written.values())[:WRITTEN_TOKENS])
    return f"{reads} → {writes}".strip() if writes else reads


def _reads(top: Sequence[Reading], usual: Usual | None) -> str:
    tokens, words = _heaviest(top, attrgetter("token")), _heaviest(top, attrgetter("word"))
    if tokens[0][1] >= COMMON:
        kind, shown = "", tokens[:1]
    else:
        kind = _kind(words)
        shown = (words if kind in DIGITS else tokens)[:READ_TOKENS]  # a token may be one digit
    listed = kind + _listed([token for token, _ in shown])
    if words[0][1] >= COMMON and "…" in tokens[0][0]:
        return f"{listed} in {_listed([words[0][0]])}"
    if around := _around(top):
        return f"{listed} {around}"
    if kind or usual is None or not (near := _near(top, usual)):
        return listed
    return f"{listed} near {_listed(near)}"


def _listed(words: Iterable[str]) -> str:
    return ", ".join(f"“{word}”" for word in words)


def _heaviest(top: Sequence[Reading], what: Callable[[Reading], str]) -> list[tuple[str, float]]:
    """What they have, in whatever case, and its share of the activation, heaviest first."""
    weight: dict[str, float] = {}
    spelling: dict[str, str] = {}
    for one in top:
        key = what(one).casefold()
        spelling.setdefault(key, what(one))
        weight[key] = weight.get(key, 0.0) + one.activation
    total = sum(weight.values())
    return [
        (spelling[key], weight[key] / total) for key in sorted(weight, key=lambda k: -weight[k])
    ]


def _kind(words: list[tuple[str, float]]) -> str:
    """What different words have in common, with a colon; empty if nothing that one could name."""

    def share(fits: Callable[[str], object]) -> float:
        return sum(part for word, part in words if fits(word))

    if share(lambda word: re.fullmatch(r"(1[5-9]|20)\d\d", word)) >= COMMON:
        return YEARS
    if share(str.isdigit) >= COMMON:
        return NUMBERS
    first = words[0][0].casefold()
    if not first.isalpha() or words[0][1] >= COMMON:
        return ""
    for size in range(len(first), STEM - 1, -1):
        if share(lambda word, stem=first[:size]: word.casefold().startswith(stem)) >= COMMON:
            return f"{first[:size]}-: "
    for size in range(len(first) - 1, ENDING - 1, -1):
        ending = first[-size:]
        fitting = [word for word, _ in words if word.casefold().endswith(ending)]
        if share(fitting.__contains__) >= COMMON:
            return f"-{ending}: " if len(fitting) >= ENDING_WORDS else ""
    return ""


def _around(top: Sequence[Reading]) -> str:
    """The few words before them, or after, if there are no others."""
    found = []
    for side, place in (("before", "after"), ("after", "before")):
        words = _heaviest(top, attrgetter(side))
        shares = list(accumulate(share for _, share in words))
        count = sum(share < COMMON for share in shares) + 1
        few = [word for word, _ in words[:count]]
        if count <= min(NEIGHBOURS, len(top) // 3 + 1) and all(few):
            found.append((count, f"{place} {_listed(few)}"))
    return min(found)[1] if found else ""


def _near(top: Sequence[Reading], usual: Usual) -> list[str]:
    """Words that stand in most of their texts, and in few others."""
    weight = Counter[str]()
    for one in top:
        weight.update(dict.fromkeys(one.nearby, one.activation))
    total = sum(one.activation for one in top)
    return [
        word
        for word, part in weight.most_common()
        if part >= NEAR * total and usual.words.get(word, 0.0) <= USUAL
    ][:NEAR_WORDS]


def readable(token: str) -> str:
    """A token as a person reads it: trimmed, newlines as ⏎; empty when it is not text.

    Control characters, halves of characters (U+FFFD) and special tokens such as <unused12> are not
    text.
    """
    text = token.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", "⇥").strip()
    if not text and token:
        return "␣"
    if "\ufffd" in text or any(unicodedata.category(char)[0] == "C" for char in text):
        return ""
    return "" if _SPECIAL.fullmatch(text) else text


def label_by_tokens(
    store: ExampleStore, sae: str, features: Sequence[int], model: Path | None, created: str
) -> list[Label]:
    """The `tokens` labels of features, those left out that have no readable token.

    Args:
        sae: Its path or address.
        model: The model's folder, to see which tokens features promote; None: only what they read.
        created: ISO date.

    Raises:
        ConfigError: The model can not be read, or is of another size.
    """
    written = _promoted(sae, features, model) if model is not None else [[] for _ in features]
    usual = Usual.of([context.tokens for context in store.contexts]) if store.contexts else None
    labels = []
    for feature, promoted in zip(features, written, strict=True):
        strongest = [e for e in choose_examples(store, feature) if e.kind == TOP]
        text = compose_label(_readings(strongest), promoted, usual)
        if text:
            labels.append(
                Label(
                    index=feature,
                    text=text,
                    labeller=LABELLER,
                    method=METHOD if model is not None else READ_METHOD,
                    created=created,
                    examples=len(strongest),
                )
            )
    return labels


def _readings(examples: Iterable[Example]) -> list[Reading]:
    found = (read(e.tokens, e.at, e.activation) for e in examples)
    return [one for one in found if one is not None]


def _promoted(sae: str, features: Sequence[int], model: Path) -> list[list[str]]:
    """The texts of the tokens that each feature promotes."""
    if not features:
        return []
    weight, gain, tokenizer = read_unembedding(model)
    directions = load_sae(sae).W_dec
    if directions.shape[1] != weight.shape[1]:
        raise ConfigError(
            f"model {model} is {weight.shape[1]} wide and the SAE reads {directions.shape[1]}; "
            f"give the model that it was trained on."
        )
    chosen = directions[list(features)].float() * gain
    return [
        [tokenizer.decode([token]) for token in tokens]
        for tokens in promoted_tokens(chosen, weight.float(), CANDIDATES)
    ]

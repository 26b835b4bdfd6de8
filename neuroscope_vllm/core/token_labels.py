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
from operator import attrgetter, itemgetter
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
YEARS, NUMBERS = "years", "numbers"
_YEAR = re.compile(r"(1[5-9]|20)\d\d")
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
        token: Without white space around it.
        begun, goes_on: Whether its word has letters before it, or after.
        word: The word that it is or belongs to.
        before, after: The words, or the marks, around that one; empty where there is none.
        nearby: The other words of its text.
        activation: The feature's.
    """

    token: str
    begun: bool
    goes_on: bool
    word: str
    before: str
    after: str
    nearby: frozenset[str]
    activation: float


def read(tokens: Sequence[str], at: int, activation: float) -> Reading | None:
    """The token `at` of a text given as the texts of its tokens; None: it is not readable.

    Words are what spaces and marks part, which fits alphabets, and not scripts without spaces.
    """
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
        token=token,
        begun=bool(begun),
        goes_on=bool(rest),
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
        tokens: Those that are seen SEEN times or more, as `readable`.
    """

    words: Mapping[str, float]
    tokens: frozenset[str]

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]]) -> Usual:
        """Texts are those of their tokens."""
        having = Counter(
            word
            for text in texts
            for word in {one.casefold() for one in _words(_WORDS.findall("".join(text)))}
        )
        tokens = Counter(readable(token) for text in texts for token in text)
        return cls(
            {word: count / len(texts) for word, count in having.items()},
            frozenset(token for token, count in tokens.items() if count >= SEEN),
        )


def _words(found: Iterable[str]) -> frozenset[str]:
    return frozenset(word for word in found if len(word) > 2 and word.isalpha())


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
        if (text := readable(token)) and (usual is None or text in usual.tokens):
            written.setdefault(text.casefold(), text)
    writes = _listed(list(written.values())[:WRITTEN_TOKENS])
    return f"{reads} → {writes}".strip() if writes else reads


def _reads(top: Sequence[Reading], usual: Usual | None) -> str:
    tokens, words = _heaviest(top, attrgetter("token")), _heaviest(top, attrgetter("word"))
    one_token, one_word = tokens[0][1] >= COMMON, words[0][1] >= COMMON
    kind = "" if one_token or one_word else _kind(words)
    if one_token:
        shown = [_marked(tokens[0][0], top)]
        if one_word and shown[0] != words[0][0]:
            return f"{_listed(shown)} in {_listed([words[0][0]])}"
    elif one_word:  # of several tokens
        shown = [words[0][0]]
    elif kind:
        shown = [word for word, _ in words if _is(kind, word)][:READ_TOKENS]
    else:
        shown = [_marked(token, top) for token, _ in tokens[:READ_TOKENS]]
    listed = f"{kind and kind + ': '}{_listed(shown)}"
    if around := _around(top):
        return f"{listed} {around}"
    if kind or usual is None or not (near := _near(top, usual)):
        return listed
    return f"{listed} near {_listed(near)}"


def _marked(token: str, top: Sequence[Reading]) -> str:
    """With an ellipsis where its word mostly goes on."""
    of = [one for one in top if one.token.casefold() == token.casefold()]
    half = sum(one.activation for one in of) / 2
    begun = sum(one.activation for one in of if one.begun) > half
    goes_on = sum(one.activation for one in of if one.goes_on) > half
    return f"{'…' if begun else ''}{token}{'…' if goes_on else ''}"


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
    """What different words have in common; empty if nothing that one could name.

    `years`, `numbers`, or what all begin with (`caus-`) or end in (`-ing`): of several the one that
    covers most, and of those the longest.
    """
    heaviest = words[0][0].casefold()
    found = [YEARS, NUMBERS]
    if heaviest.isalpha():
        found += [f"{heaviest[:size]}-" for size in range(len(heaviest), STEM - 1, -1)]
        found += [f"-{heaviest[-size:]}" for size in range(len(heaviest) - 1, ENDING - 1, -1)]
    covered = {kind: sum(share for word, share in words if _is(kind, word)) for kind in found}
    kind = max(found, key=covered.__getitem__)
    if covered[kind] < COMMON:
        return ""
    fitting = sum(_is(kind, word) for word, _ in words)
    return kind if fitting >= (ENDING_WORDS if kind.startswith("-") else 2) else ""


def _is(kind: str, word: str) -> bool:
    if kind in (YEARS, NUMBERS):
        return word.isdigit() and (kind == NUMBERS or bool(_YEAR.fullmatch(word)))
    word, part = word.casefold(), kind.strip("-")
    return word.endswith(part) if kind.startswith("-") else word.startswith(part)


def _around(top: Sequence[Reading]) -> str:
    """The few words before them, or after, that stand there again and again."""
    found = []
    for side, place in (("before", "after"), ("after", "before")):
        words = _heaviest(top, attrgetter(side))
        count = sum(share < COMMON for share in accumulate(share for _, share in words)) + 1
        few = [word for word, _ in words[:count]]
        seen = Counter(getattr(one, side).casefold() for one in top)
        if count <= NEIGHBOURS and all(word and seen[word.casefold()] > 1 for word in few):
            found.append((count, f"{place} {_listed(few)}"))
    return min(found, key=itemgetter(0))[1] if found else ""


def _near(top: Sequence[Reading], usual: Usual) -> list[str]:
    """Words that stand in most of their texts, and in few others."""
    weight, spelling = Counter[str](), {}
    for one in top:
        spelling |= {word.casefold(): word for word in one.nearby}
        weight.update(dict.fromkeys({word.casefold() for word in one.nearby}, one.activation))
    total = sum(one.activation for one in top)
    own = {one.word.casefold() for one in top}
    return [
        spelling[word]
        for word, part in weight.most_common()
        if part >= NEAR * total and usual.words.get(word, 0.0) <= USUAL and word not in own
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
    # Held-out text: of it no more is known here than how often it has a word.
    texts = store.table("contexts", ["tokens"])["tokens"].to_pylist()
    usual = Usual.of(texts) if texts else None
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

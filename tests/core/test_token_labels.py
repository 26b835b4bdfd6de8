"""Labels by eye."""

from __future__ import annotations

import pytest
import torch

from neuroscope_vllm.core.token_labels import (
    Reading,
    Usual,
    compose_label,
    promoted_tokens,
    read,
    readable,
)


def test_promoted_tokens_stand_out_or_there_are_none() -> None:
    draw = torch.Generator().manual_seed(0)
    unembedding = torch.randn(5000, 256, generator=draw)
    noise = torch.randn(256, generator=draw)
    aimed = 3 * unembedding[11] + 2.5 * unembedding[22]
    assert promoted_tokens(torch.stack([aimed, noise]), unembedding) == [[11, 22], []]
    many = torch.stack([unembedding[i] for i in range(130)])
    assert [ids[0] for ids in promoted_tokens(many, unembedding, k=1)] == list(range(130))
    assert promoted_tokens(aimed[None], unembedding.bfloat16()) == [[11, 22]]


def seen(*texts: str) -> list[Reading]:
    """Texts whose token stands between bars, of falling strength."""
    found = []
    for strength, text in enumerate(reversed(texts), start=10):
        before, token, after = text.split("|")
        if reading := read([before, token, after], 1, float(strength)):
            found.append(reading)
    return found[::-1]


@pytest.mark.parametrize(
    ("texts", "promoted", "label"),
    [
        (
            ["to| Paris| is", "in| Rome|.", "the| city|", "a| town| of"],
            [" of", ",", " and"],
            "“Paris”, “Rome”, “city” → “of”, “,”",
        ),
        (["a |dog|", "|Dog|!", "two| cat|s", "|mouse|"], [], "“dog”, “cat…”, “mouse”"),
        (["x.|\n|", "y|\n|z", "c| |d", "|\t|"], [], "“⏎”, “␣”, “⇥”"),
        (["|b|", "|B|.", "|b| b", "|a|"], [" X", "x", "\ufffd", "<unused7>"], "“b” → “X”"),
        (["|\ufffd|", "|<pad>|", "|\x00|"], ["ok"], "→ “ok”"),
        ([], [], ""),
        # A part of a word, mostly or not.
        (["|go|ing", "to |go|", "a |go|at", "|stay|"], [], "“go…”"),
        (["to en|circ|le", "an en|circ|le", "En|circ|le"], [], "“…circ…” in “encircle”"),
        (["so |…| yes", "|…|", "no|…|"], [], "“…”"),
        (["of 1|7|89", "in 17|8|9", "since 1|7|89"], [], "“1789”"),
        # What they have in common: all that are listed.
        (["had| caused| it", "is| causing|", "was| caused|"], [], "caus-: “caused”, “causing”"),
        (["|receiv|ing", "|received|"], [], "receiv-: “receiving”, “received”"),
        (["|when| he", "|whenever|", "|when| I", "|as|"], [], "when-: “when”, “whenever”"),
        (["is| running|", "was| going|", "by| making|"], [], "-ing: “running”, “going”, “making”"),
        (["of 1|7|89", "in 18|6|5", "since 19|5|0"], [], "years: “1789”, “1865”, “1950”"),
        (["of |1|", "in 1|2| b", "x |33| c"], [], "numbers: “1”, “12”, “33”"),
        # What stands around them, again and again.
        (["in| order| to", "In| order|.", "in| order| that"], [], "“order” after “in”"),
        (["keep| in| order", "|in| order"], [" order"], "“in” before “order” → “order”"),
        (["the| United| States", "The| same| one"], [], "“United”, “same” after “the”"),
        (["keep| in| order"], [], "“in”"),
        (["can| go| on", "must| stay|", "can| be|."], [], "“go”, “stay”, “be”"),
        (["I| go|", "you| go|", "I| be|", "you| do|"], [], "“go”, “be”, “do” after “I”, “you”"),
        # Not from across a special token.
        (["in<bos>|Paris|", "in<bos>|Paris|"], [], "“Paris”"),
    ],
)  # fmt: skip
def test_a_label_says_what_tokens_have_in_common(
    texts: list[str], promoted: list[str], label: str
) -> None:
    assert compose_label(seen(*texts), promoted) == label


def test_a_label_says_what_other_texts_have_not() -> None:
    other = [["These", " words", " are", " usual", "."]] * 5 + [["rare"]]
    top = seen("usual Frogs |means|", "of Frogs |of| usual", "|the| Frogs and toads usual")
    usual = Usual.of(other)
    label = compose_label(top, ["rare", "words", " are"], usual)
    assert label == "“means”, “of”, “the” near “Frogs” → “words”, “are”"
    frogs = seen("|Frogs| croak", "of |Frogs|", "his |toads|, the Frogs")
    assert compose_label(frogs, [], usual) == "“Frogs”, “toads”"
    assert compose_label(top) == "“means”, “of”, “the”"


@pytest.mark.parametrize(
    ("token", "shown"),
    [("</div>", "</div>"), ("<bos>", ""), ("<0xE2>", ""), ("\t\t", "⇥⇥"), ("", ""), ("人", "人")],
)
def test_readable(token: str, shown: str) -> None:
    assert readable(token) == shown

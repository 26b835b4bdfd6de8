"""Texts of tokens: joined, they are what vLLM returns.

The expectations were checked against vLLM 0.32's FastIncrementalDetokenizer on 6,000 random
sequences with this tokenizer; here are the cases that matter, one by one.
"""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from neuroscope_vllm.core.detokenize import OutputText, TextStream
from tests.server.side import make_tokenizer

EOS = 256
TOKENIZER = make_tokenizer()


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


def output(
    stop: list[str] | None = None,
    include: bool = False,
    skip_special: bool = True,
    min_tokens: int = 0,
) -> OutputText:
    stream = TextStream(TOKENIZER, ids_of("prompt"), skip_special)
    return OutputText(
        stream, stop=stop or [], include_stop_str_in_output=include, min_tokens=min_tokens
    )


def test_a_split_character_comes_with_its_last_token():
    released = output().push(ids_of("a🙂b"), None, None)
    assert released.texts == ["a", "", "", "", "🙂", "b"]


@given(st.text(max_size=30), st.integers(1, 5))
def test_any_text_comes_back_whole(text: str, step: int):
    told, ids = output(), ids_of(text)
    texts = [
        t
        for at in range(0, len(ids), step)
        for t in told.push(ids[at : at + step], None, None).texts
    ]
    assert "".join(texts) == text


@pytest.mark.parametrize(
    ("include", "skip_special", "text"),
    [(False, False, "hi"), (True, False, "hi<eos>"), (True, True, "hi")],
)
def test_a_stop_token_is_text_only_when_asked_for(include: bool, skip_special: bool, text: str):
    told = output(include=include, skip_special=skip_special)
    released = told.push([*ids_of("hi"), EOS], "stop", None)
    assert "".join(released.texts) == text
    assert len(released.token_ids) == 3


def test_an_int_stop_reason_is_a_stop_token_too():
    assert "".join(output().push(ids_of("hi!"), "stop", ids_of("!")[0]).texts) == "hi"


def test_length_keeps_the_last_token():
    assert "".join(output().push(ids_of("hi!"), "length", None).texts) == "hi!"


def test_text_is_held_back_while_it_may_be_cut():
    told = output(stop=["END"])
    assert told.push(ids_of("abcd"), None, None).texts == ["a", "b"]
    assert told.push(ids_of("e"), None, None).texts == ["c"]
    assert told.push([], "length", None).texts == ["d", "e"]


@pytest.mark.parametrize(("include", "text"), [(False, "one "), (True, "one END")])
def test_a_stop_string_ends_the_text_and_explains_the_abort(include: bool, text: str):
    told = output(stop=["END"], include=include)
    released = told.push(ids_of("one END and"), None, None)
    texts, count = released.texts, len(released.token_ids)
    released = told.push(ids_of(" more"), None, None)
    assert released.token_ids == []
    released = told.push([], "abort", None)
    assert "".join(texts + released.texts) == text
    assert released.finish_reason == "stop"
    assert count + len(released.token_ids) == len("one END")


def test_an_abort_without_a_stop_string_stays_one():
    told = output(stop=["END"])
    told.push(ids_of("one"), None, None)
    assert told.push([], "abort", None).finish_reason == "abort"


def test_the_stop_string_that_completes_first_wins():
    told = output(stop=["bcd", "c"])
    first = told.push(ids_of("abcd"), None, None)
    assert "".join(first.texts + told.push([], "abort", None).texts) == "ab"


@pytest.mark.parametrize(("min_tokens", "text"), [(0, ""), (2, ""), (3, "ENDxy")])
def test_stop_strings_count_after_min_tokens(min_tokens: int, text: str):
    told = output(stop=["END"], min_tokens=min_tokens)
    texts = [t for id_ in ids_of("ENDxyEND") for t in told.push([id_], None, None).texts]
    texts += told.push([], "length", None).texts
    assert "".join(texts) == text


def test_special_tokens_in_a_row_come_bare_without_spaces_between():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    tokenizer.add_special_tokens(["<s>"])
    texts = [
        [TextStream.step(stream, token_id) for token_id in (0, 1, 1, 0)]
        for stream in (
            TextStream(tokenizer, [], False),
            TextStream(tokenizer, [], False, spaces_between_special_tokens=False),
        )
    ]
    assert texts == [["a", " <s>", " <s>", " a"], ["a", " <s>", "<s>", " a"]]


def test_without_a_tokenizer_tokens_are_shown_by_id():
    told = OutputText(TextStream(None, [1], True), stop=[], include_stop_str_in_output=False)
    assert told.push([7, 8], "length", None).texts == ["<7>", "<8>"]


def test_unknown_ids_have_no_text():
    stream = TextStream(TOKENIZER, [], False)
    assert stream.step(10**6) == ""
    assert stream.step(-1) == ""
    assert stream.step(ids_of("a")[0]) == "a"


def test_a_prompt_of_bytes_that_are_no_text_takes_no_longer_than_another():
    """16,000 of them took 20 s, as each decoded all before it."""
    lone = ids_of("é")[1]
    stream = TextStream(TOKENIZER, [], skip_special_tokens=False, bounded=True)
    began = time.monotonic()
    texts = [stream.step(one) for one in [*ids_of("é"), *[lone] * 16_000, *ids_of("a🙂")]]
    assert time.monotonic() - began < 2
    assert texts[:2] == ["", "é"]
    assert "".join(texts) == "é" + "\ufffd" * 16_000 + "a🙂"
    assert max(map(len, texts)) < 40


@given(st.text(st.sampled_from("\ufffd\ufffd\ufffd\ufffdaé€🙂"), max_size=60))
def test_a_bounded_stream_tells_replacement_characters_as_the_text_has_them(text: str):
    stream = TextStream(TOKENIZER, [], skip_special_tokens=False, bounded=True)
    told = "".join(stream.step(one) for one in [*ids_of(text), *ids_of("!")])
    assert told == text + "!"

"""The texts of a choice's tokens, joined, are vLLM's text: over HTTP on generated text, and beside
vLLM's own detokenizer on token sequences that no model would write."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

from neuroscope_vllm.core.detokenize import OutputText, TextStream
from neuroscope_vllm.engine.hf import gguf
from tests.support import models as tiny
from tests.vllm.shapes.asking import CHAT, COMPLETION, Answer, Api

RANDOM_REQUESTS = 100
TOKENS = 60
VOCABULARY = 450  # the tiny tokenizer has a few more

streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


def same_text(api: Api, answer: Answer) -> list[str]:
    """Tokens, text and end of every choice; returns the texts."""
    for trace in api.traces(answer):
        said = answer.choices[trace["choice"]]
        tokens = [e for e in trace["events"] if e["event"] == "token"]
        assert [e["token_id"] for e in tokens] == said.tokens
        assert "".join(e["token"] for e in tokens) == said.text
        assert trace["events"][-1]["finish_reason"] == said.finish_reason
    return [choice.text for choice in answer.choices.values()]


# Over HTTP

TEXTS = {
    "family": "👨‍👩‍👧‍👦 and 👩🏽‍🚀!",
    "flags": "🇫🇷🇮🇹🏴‍☠️ 🇺🇳",
    "chinese": "你好，世界。𠜎𠜱 漢字",
    "arabic": "مرحبا بالعالم، كيف حالك؟",
    "accents": "e\u0301 n\u0303 Z\u0351\u036b\u0343 \u1ec7",
    "hindi": "नमस्ते दुनिया",
    "code": "    def f(a):\n\t\treturn {'a':  a}\n\n\n  # end\n",
    "spaces": "   a  b   ",
    "replacement": "a\ufffdb\ufffd\ufffd",
    "zero-width": "a\u200bb\u200dc\ufeffd",
    "quotes": "\"quoted\" \\n 'and' <bos> </s>",
}


@streamed_or_not
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_of_many_scripts(api: Api, path: str, name: str, stream: bool) -> None:
    text = TEXTS[name]
    prompt = {"messages": [{"role": "user", "content": "🙂"}]} if path == CHAT else {"prompt": "é"}
    body = {
        **prompt,
        "structured_outputs": {"choice": [text]},
        "max_tokens": 300,
        "skip_special_tokens": False,
    }
    # vLLM never tells a replacement character at the end: it might become another one.
    expected = text.rstrip("\ufffd")
    (said,) = same_text(api, api.ask(path, body, stream=stream))
    assert said.removesuffix("<eos>") == expected


@streamed_or_not
@pytest.mark.parametrize("max_tokens", range(1, 8))
def test_a_text_cut_within_a_character(api: Api, max_tokens: int, stream: bool) -> None:
    """Seven bytes in seven tokens: vLLM shows no half character, and neither do we."""
    choices = {"structured_outputs": {"choice": ["𠜎𠜱𠝹"]}, "max_tokens": max_tokens}
    (text,) = same_text(api, api.ask(COMPLETION, {"prompt": "a", **choices}, stream=stream))
    assert text in ("", "𠜎", "𠜎𠜱", "𠜎𠜱𠝹")


@streamed_or_not
@pytest.mark.parametrize("spaces", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens(api: Api, skip: bool, spaces: bool, stream: bool) -> None:
    body = {
        "prompt": "a",
        "max_tokens": 30,
        "allowed_token_ids": [0, 1, 2, 3, 4, 70, 71, 300],
        "ignore_eos": True,
        "skip_special_tokens": skip,
        "spaces_between_special_tokens": spaces,
    }
    (text,) = same_text(api, api.ask(COMPLETION, body, stream=stream))
    assert ("<bos>" in text or "<turn>" in text) is not skip


def any_options(pick: random.Random) -> dict[str, Any]:
    """Random sampling over all tokens: bytes, halves of characters, special tokens, words."""
    body = {
        "max_tokens": TOKENS,
        "temperature": pick.choice([1.0, 2.0]),
        "ignore_eos": pick.random() < 0.8,
        "skip_special_tokens": pick.random() < 0.5,
        "spaces_between_special_tokens": pick.random() < 0.5,
        "n": 2,
    }
    if pick.random() < 0.5:
        body["stop"] = pick.sample(["a", "e ", "in", " t", "\ufffd", "<bos>", "th", "é", "\n"], 2)
        body["include_stop_str_in_output"] = pick.random() < 0.5
        body["min_tokens"] = pick.choice([0, 0, 10, 40])
    if pick.random() < 0.3:
        body["stop_token_ids"] = [pick.randrange(VOCABULARY) for _ in range(5)]
        body["include_stop_str_in_output"] = pick.random() < 0.5
    return body


def test_random_sampling(api: Api) -> None:
    """Two hundred texts, half of them streamed."""
    pick = random.Random(11)
    bodies = [any_options(pick) for _ in range(RANDOM_REQUESTS)]
    prompts = [[pick.randrange(VOCABULARY) for _ in range(pick.randrange(1, 12))] for _ in bodies]

    def one(number: int) -> list[str]:
        body = {"prompt": prompts[number], **bodies[number]}
        return same_text(api, api.ask(COMPLETION, body, stream=number % 2 == 0))

    with ThreadPoolExecutor(8) as pool:
        texts = [text for two in pool.map(one, range(RANDOM_REQUESTS)) for text in two]
    assert len(set(texts)) > RANDOM_REQUESTS
    assert sum("\ufffd" in text for text in texts) > 20


# Beside vLLM's detokenizer


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma decode: `▁` for spaces, `<0xNN>` for what has no token."""
    words = ["▁", "▁a", "a", "b", "▁th", "e", "é", "你", "▁▁▁▁", "\n", "🙂", "\u0301", "!"]
    pieces = ["<unk>", "<s>", "</s>", "<turn>", *(f"<0x{n:02X}>" for n in range(256)), *words]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: at for at, piece in enumerate(pieces)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>", "<turn>"])
    backend.add_tokens(["<tool>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def word_pieces() -> PreTrainedTokenizerFast:
    """As BERT decodes: spaces between words, and clean-up, which is not monotonic."""
    pieces = ["[UNK]", "[SEP]", "do", "n't", "'", "t", "##s", "##ing", "go", ".", ",", "!", "##é"]
    backend = Tokenizer(
        models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[SEP]"])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def smollm2(cache: Path) -> PreTrainedTokenizerFast:
    gguf.convert_gguf(gguf.find_demo_gguf(cache), cache / "smollm2-135m-instruct")
    return AutoTokenizer.from_pretrained(cache / "smollm2-135m-instruct")


CACHE = os.environ.get("NEUROSCOPE_CACHE")
"""Read before a fixture clears the environment."""


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback", "word-pieces", "smollm2"])
def tokenizers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedTokenizerFast, Tokenizer]:
    """vLLM's, and the hub's, which is made of its JSON."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = {
        "byte-level": lambda: tiny.write_tokenizer(folder),
        "byte-fallback": byte_fallback,
        "word-pieces": word_pieces,
        "smollm2": lambda: smollm2(Path(CACHE) if CACHE else folder),
    }[request.param]()
    return tokenizer, Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Tokens as the engine hands them out, in steps of one or, with drafts, several; the numbers
    are folded into the tokenizer's range."""
    token = st.one_of(st.integers(0, 300), st.integers(0, 10**6))
    return {
        "prompt": draw(st.lists(token, max_size=8)),
        "steps": draw(st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=20)),
        "end": draw(st.sampled_from(["length", "stop", None])),
        "overrun": draw(st.lists(st.lists(token, min_size=1, max_size=3), max_size=3)),
        "stop": draw(st.none() | st.lists(st.integers(0, 10**6), min_size=1, max_size=3)),
        "include": draw(st.booleans()),
        "min_tokens": draw(st.sampled_from([0, 0, 1, 5, 20])),
        "skip": draw(st.booleans()),
        "spaces": draw(st.booleans()),
    }


@settings(max_examples=1000)
@given(run=runs())
def test_as_vllms_detokenizer(
    tokenizers: tuple[PreTrainedTokenizerFast, Tokenizer], run: dict[str, Any]
) -> None:
    theirs, ours = tokenizers
    size = len(theirs)
    steps = [[token % size for token in step] for step in run["steps"]]
    flat = [token for step in steps for token in step]
    # Stop strings that do occur: text of one or two of the tokens, and pieces of it.
    stop = [
        text[at % 2 : at % 5 + 2]
        for at in run["stop"] or []
        if (text := ours.decode(flat[at % len(flat) :][:2], False))[at % 2 : at % 5 + 2]
    ]
    prompt = [token % size for token in run["prompt"]]
    params = SamplingParams(
        stop=stop,
        include_stop_str_in_output=run["include"],
        min_tokens=run["min_tokens"],
        max_tokens=1000,
        skip_special_tokens=run["skip"],
        spaces_between_special_tokens=run["spaces"],
    )
    request = EngineCoreRequest("a", prompt, None, params, None, 0.0, None, None, None)
    front = FastIncrementalDetokenizer(theirs, request)
    told = OutputText(
        TextStream(ours, prompt, run["skip"], run["spaces"]),
        stop=stop,
        include_stop_str_in_output=run["include"],
        min_tokens=run["min_tokens"],
    )
    texts, ids = [], []
    end = stopped = reason = None

    def hear(tokens: list[int], end: str | None) -> str | None:
        released = told.push(tokens, end, None)
        texts.extend(released.texts)
        ids.extend(released.token_ids)
        return released.finish_reason

    for at, step in enumerate(steps):
        end = run["end"] if at == len(steps) - 1 else None
        stopped = front.update(step, end == "stop")
        reason = hear(step, end)
        if stopped or end:
            break
    if end is None:
        # The last token waits for the end, lest it be taken for one that the model ran on.
        assert not stopped or ids == front.output_token_ids[: len(ids)] != front.output_token_ids
        # A stop string, of which the engine hears late, or a client that left.
        for step in run["overrun"] if stopped else []:
            hear([token % size for token in step], None)
        reason = hear([], "abort")
    assert "".join(texts) == front.get_next_output_text(finished=True, delta=False)
    assert ids == front.output_token_ids
    assert reason == ("stop" if stopped else end or "abort")

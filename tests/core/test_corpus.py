"""Samples from real files through `datasets`, with the tiny models' own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from neuroscope_vllm.core.corpus import Corpus, digest, samples
from neuroscope_vllm.core.errors import ConfigError
from tests.support import models

LONG = " ".join(models.TRAINING_TEXT).replace("\n\n", "\n")
SHORT = "A heading"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = models.write_tokenizer(folder)
    beginning = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", fast.bos_token_id or 0)]
    )
    fast.backend_tokenizer.post_processor = beginning  # as Gemma's and Llama's do
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def cut(tokenizer: Any, source: Path, **options: Any) -> list[list[int]]:
    return list(samples(Corpus(source=str(source), **options), tokenizer))


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_all_kinds_of_files_give_the_same_samples(tokenizer: Any, tmp_path: Path) -> None:
    texts = [LONG, SHORT, LONG[50:400]]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    write_jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    write_jsonl(tmp_path / "ids.jsonl", *({"token_ids": row} for row in ids))
    kinds = [
        cut(tokenizer, tmp_path / name, max_tokens=40)
        for name in ("a.txt", "a.jsonl", "a.parquet", "ids.jsonl")
    ]
    assert all(kind == kinds[0] for kind in kinds)
    bos = [tokenizer.bos_token_id]
    pieces = [row[at : at + 39] for row in ids for at in range(0, len(row), 39)]
    assert kinds[0] == [bos + piece for piece in pieces if len(piece) >= 16]


def test_a_folder_of_one_kind_is_read_by_name(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "2.jsonl", {"text": LONG[::-1]})
    write_jsonl(tmp_path / "1.jsonl", {"text": LONG})
    first = cut(tokenizer, tmp_path / "1.jsonl") + cut(tokenizer, tmp_path / "2.jsonl")
    assert cut(tokenizer, tmp_path) == first
    assert cut(tokenizer, tmp_path, samples=1) == first[:1]


def test_chats_go_through_the_models_template(tokenizer: Any, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "Yes."}]
    path = write_jsonl(tmp_path / "c.jsonl", {"messages": chat, "text": "not this one " * 20})
    (sample,) = cut(tokenizer, path, max_tokens=4096)
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    whole = tokenizer.encode(text, add_special_tokens=False)
    assert sample == whole if whole[0] == tokenizer.bos_token_id else sample[1:] == whole
    halves = [{"type": "text", "text": LONG[:50]}, {"type": "text", "text": LONG[50:]}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
    openai = {"messages": [{"role": "user", "content": halves}, answer]}
    as_sent = write_jsonl(tmp_path / "o.jsonl", openai)
    assert cut(tokenizer, as_sent, max_tokens=4096) == [sample]
    other = cut(tokenizer, path, column="text", max_tokens=4096)
    assert "not this one" in tokenizer.decode(other[0])


@settings(max_examples=20)
@given(st.lists(st.lists(st.integers(5, 200), max_size=60), min_size=1, max_size=5))
def test_every_token_is_in_one_sample_or_in_a_short_end(
    tokenizer: Any, tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]]
) -> None:
    path = write_jsonl(tmp_path_factory.mktemp("r") / "r.jsonl", *({"token_ids": r} for r in rows))
    if not any(rows):
        return  # a column of empty lists has no type
    found = cut(tokenizer, path, max_tokens=20, min_tokens=1)
    assert [i for sample in found for i in sample[1:]] == [i for row in rows for i in row]
    assert all(len(sample) <= 20 and sample[0] == tokenizer.bos_token_id for sample in found)


def test_the_digest_tells_order_content_and_what_came_before() -> None:
    known = {
        digest([[1, 2], [3]]),
        digest([[3], [1, 2]]),
        digest([[1], [2, 3]]),
        digest([[1, 2], [3]], before="x"),
    }
    assert len(known) == 4
    assert digest([[1, 2], [3]]) in known


def refused(tokenizer: Any, source: Path | str, why: str, **options: Any) -> None:
    with pytest.raises(ConfigError, match=why):
        list(samples(Corpus(source=str(source), **options), tokenizer))


def test_what_can_not_be_read_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    refused(tokenizer, tmp_path / "empty.txt", "empty.txt has no rows")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    refused(tokenizer, tmp_path / "broken.jsonl", "broken.jsonl can not be read")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 is how it begins")
    refused(tokenizer, tmp_path / "broken.parquet", "broken.parquet can not be read")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    write_jsonl(mixed / "a.jsonl", {"text": LONG})
    (mixed / "b.pdf").write_bytes(b"%PDF")
    refused(tokenizer, mixed, "holds .jsonl, .pdf; give files of one kind")
    (tmp_path / "none").mkdir()
    refused(tokenizer, tmp_path / "none", "holds nothing")
    strange = write_jsonl(tmp_path / "strange.jsonl", {"story": LONG})
    refused(tokenizer, strange, "has the columns story, but no token_ids or messages or text")
    refused(tokenizer, strange, "but no tale; name one with --column", column="tale")
    assert cut(tokenizer, strange, column="story")
    numbers = write_jsonl(tmp_path / "numbers.jsonl", {"text": 3})
    refused(tokenizer, numbers, "row 1 of corpus .* has no text that can be read")
    far = write_jsonl(tmp_path / "far.jsonl", {"token_ids": [1, 10**6]})
    refused(tokenizer, far, "1000000 is none of the model's .* token ids")
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
    pictures = write_jsonl(tmp_path / "pictures.jsonl", {"messages": image})
    refused(tokenizer, pictures, "row 1 .* message of 'user' has parts that are no text")
    silent = write_jsonl(tmp_path / "silent.jsonl", {"messages": [{"role": "user"}]})
    refused(tokenizer, silent, "row 1 .* message of 'user' has no text")
    nulls = write_jsonl(tmp_path / "nulls.jsonl", {"text": None}, {"text": LONG})
    assert cut(tokenizer, nulls)

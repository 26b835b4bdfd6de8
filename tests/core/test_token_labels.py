"""Top examples against a plain sort, and labels by eye."""

from __future__ import annotations

import pytest
import torch

from neuroscope_vllm.core.token_labels import (
    Example,
    TopExamples,
    compose_label,
    promoted_tokens,
    readable,
)

WIDTH, M = 12, 4


@pytest.mark.parametrize("batches", [[200], [50] * 4, [1] * 30, [3, 0, 90, 1]])
def test_the_strongest_examples_of_a_stream_are_kept(batches: list[int]) -> None:
    n = sum(batches)
    draw = torch.Generator().manual_seed(n)
    activations = torch.rand(n, WIDTH, generator=draw) * (
        torch.rand(n, WIDTH, generator=draw) < 0.3
    )
    activations[:, 0] = 0
    activations[n // 2 :, 1] = 0.5  # ties
    token_ids = torch.randint(0, 99, (n,), generator=draw)
    top = TopExamples(WIDTH, M)
    positions = torch.arange(n)
    for part in positions.split(batches):
        top.update(activations[part], token_ids[part], part + 1000)
    for feature in range(WIDTH):
        column = activations[:, feature]
        order = column.sort(descending=True, stable=True).indices[:M].tolist()
        assert top.of(feature) == [
            Example(float(column[row]), int(token_ids[row]), row + 1000)
            for row in order
            if column[row] > 0
        ]


def test_bf16_activations_are_kept_as_they_are() -> None:
    top = TopExamples(2, 1)
    top.update(torch.tensor([[0.0, 2.5]]).bfloat16(), torch.tensor([7]), torch.tensor([3]))
    assert (top.of(0), top.of(1)) == ([], [Example(2.5, 7, 3)])


def test_promoted_tokens_stand_out_or_there_are_none() -> None:
    draw = torch.Generator().manual_seed(0)
    unembedding = torch.randn(5000, 256, generator=draw)
    noise = torch.randn(256, generator=draw)
    aimed = 3 * unembedding[11] + 2.5 * unembedding[22]
    assert promoted_tokens(torch.stack([aimed, noise]), unembedding) == [[11, 22], []]
    many = torch.stack([unembedding[i] for i in range(130)])
    assert [ids[0] for ids in promoted_tokens(many, unembedding, k=1)] == list(range(130))
    assert promoted_tokens(aimed[None], unembedding.bfloat16()) == [[11, 22]]


@pytest.mark.parametrize(
    ("top", "promoted", "label"),
    [
        (
            [(" Paris", 9.0), (" Rome", 8.0), (" city", 7.0), (" town", 6.0)],
            [" of", ",", " and"],
            "“Paris”, “Rome”, “city” → “of”, “,”",
        ),
        ([("dog", 5.0), (" Dog", 4.0), (" cat", 6.0)], [], "“dog”, “cat”"),
        ([("\n", 5.0), (" a\nb", 4.0), (" ", 1.0)], [], "“⏎”, “a⏎b”, “␣”"),
        (
            [("a", 3.0), ("b", 2.0), ("b", 2.0)],
            [" X", "x", "\ufffd", "<unused7>"],
            "“b”, “a” → “X”",
        ),
        ([("\ufffd", 9.0), ("<|im_end|>", 8.0), ("\x00", 7.0)], ["ok"], "→ “ok”"),
        ([], [], ""),
    ],
)
def test_a_label_shows_readable_tokens_once(
    top: list[tuple[str, float]], promoted: list[str], label: str
) -> None:
    assert compose_label(top, promoted) == label


@pytest.mark.parametrize(
    ("token", "shown"),
    [("</div>", "</div>"), ("<bos>", ""), ("<0xE2>", ""), ("\t\t", "⇥⇥"), ("", ""), ("人", "人")],
)
def test_readable(token: str, shown: str) -> None:
    assert readable(token) == shown

"""Activation patching's core: metric, alignment, plan, the algebra of features, the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.patching.align import aligned, check_aligned, choose, common_start
from neuroscope_vllm.core.patching.metric import Ends, check_ends
from neuroscope_vllm.core.patching.page import heat_page
from neuroscope_vllm.core.patching.plan import Plan, Target
from neuroscope_vllm.core.patching.record import Answer, Column, Patching, Prompt
from neuroscope_vllm.core.patching.swap import Swap
from neuroscope_vllm.core.sae import SAE, load_sae
from tests.support.browser import needs_browser, opened
from tests.support.models import write_saelens_sae

HOSTILE = "</script><script>window.owned = 1</script><img src=http://192.0.2.1/x onerror=owned=1>"
TOKENS = st.lists(st.integers(0, 5), min_size=1, max_size=30)
LOGITS = st.floats(-50, 50)


@given(clean=LOGITS, corrupted=LOGITS, share=st.floats(-2, 3))
def test_recovered_is_the_share_of_the_way(clean: float, corrupted: float, share: float) -> None:
    ends = Ends(clean, corrupted)
    if abs(clean - corrupted) < 0.1:
        with pytest.raises(ConfigError, match="too close") as raised:
            check_ends(ends, " a", " b")
        assert f"{clean:.3f}" in str(raised.value)
        return
    check_ends(ends, " a", " b")
    assert ends.recovered(clean) == 1.0
    assert ends.recovered(corrupted) == 0.0
    between = corrupted + share * (clean - corrupted)
    assert ends.recovered(between) == pytest.approx(share, abs=1e-9)


def test_a_metric_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="nan"):
        check_ends(Ends(float("nan"), 1.0), "a", "b")


@given(into=TOKENS, source=TOKENS)
def test_alignment_is_one_to_one_and_in_order(into: list[int], source: list[int]) -> None:
    columns = aligned(into, source)
    assert [column.position for column in columns] == list(range(len(into)))
    sources = [column.source for column in columns if column.source is not None]
    assert sources == sorted(set(sources))
    assert all(0 <= one < len(source) for one in sources)
    if len(into) == len(source):
        assert sources == list(range(len(into)))


@given(start=TOKENS, added=TOKENS, end=TOKENS)
def test_what_was_inserted_has_no_source(
    start: list[int], added: list[int], end: list[int]
) -> None:
    base, longer = [*start, 99, *end], [*start, 99, *(one + 10 for one in added), *end]
    columns = aligned(longer, base)
    unmatched = [column.position for column in columns if column.source is None]
    assert unmatched == list(range(len(start) + 1, len(start) + 1 + len(added)))
    assert all(column.source is not None for column in aligned(base, longer))


def test_a_word_of_another_length_in_the_midst() -> None:
    sources = [column.source for column in aligned([1, 2, 7, 8, 3, 4], [1, 2, 9, 3, 5])]
    # 7 8 for 9 can not be matched one to one; 4 for 5 can.
    assert sources == [0, 1, None, None, 3, 4]


def test_prompts_of_different_lengths_are_shown() -> None:
    words = [f"w{i}" for i in range(30)]
    long = prompt([*words, " Paris", *words])
    short = prompt([*words, " New", " York", *words])
    with pytest.raises(ConfigError, match=r"61 tokens .* 62 ") as raised:
        check_aligned(long, short)
    said = str(raised.value)
    assert "(… 'w27' 'w28' 'w29' ' Paris' 'w0' 'w1' 'w2' …)" in said
    assert "' New' ' York'" in said
    assert "--align, which patches the 60 positions" in said
    check_aligned(long, long)


def prompt(words: list[str]) -> Prompt:
    ids = [sum(map(ord, word)) for word in words]
    return Prompt(text="".join(words), token_ids=ids, tokens=words)


@given(one=TOKENS, other=TOKENS)
def test_the_common_start(one: list[int], other: list[int]) -> None:
    same = common_start(one, other)
    assert one[:same] == other[:same]
    assert one[same : same + 1] != other[same : same + 1] or same in (len(one), len(other))


def test_which_positions_are_patched() -> None:
    columns = aligned([1, 2, 3, 4], [1, 5, 3, 4])
    assert [c.position for c in choose(columns, None, 1)] == [1, 2, 3]
    assert [c.position for c in choose(columns, [3, 0], 1)] == [0, 3]
    with pytest.raises(ConfigError, match=r"position 4 does not exist.*numbered 0 to 3"):
        choose(columns, [1, 4], 1)
    with pytest.raises(ConfigError, match="none of the positions"):
        choose(aligned([1, 2, 3], [1, 3]), [1], 0)


@given(
    layers=st.sets(st.integers(0, 9), min_size=1),
    sources=st.lists(st.none() | st.integers(0, 9), min_size=1).filter(lambda x: any(
        one is not None for one in x)),
)  # fmt: skip
def test_a_plan_runs_every_cell_once_and_finds_it_again(
    layers: set[int], sources: list[int | None]
) -> None:
    columns = [Column(position=at, source=one) for at, one in enumerate(sources)]
    plan = Plan([Target(layer) for layer in sorted(layers)], columns)
    usable = [column for column in columns if column.source is not None]
    assert len(plan.runs) == len(layers) * (len(usable) + (len(usable) > 1))
    # A metric that says which run it is of.
    metrics = [
        1000.0 * run.target.layer + sum(column.position + 1 for column in run.columns)
        for run in plan.runs
    ]
    for row in plan.rows(metrics, Ends(1.0, 0.0)):
        for column, metric in zip(columns, row.metric, strict=True):
            expected = 1000.0 * row.layer + column.position + 1
            assert metric == (None if column.source is None else expected)
        assert row.metric_of_all == 1000.0 * row.layer + sum(c.position + 1 for c in usable)
        assert row.recovered == row.metric


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> SAE:
    folder = tmp_path_factory.mktemp("patching") / "layer_3"
    return load_sae(write_saelens_sae(folder, d_model=32, width=128, layer=3))


def rows(seed: int) -> torch.Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("norm", [None, "constant_norm_rescale", "layer_norm"])
def test_features_are_patched_and_the_error_term_stays(sae: SAE, norm: str | None) -> None:
    """x' = decode(f') + (x - decode(f)), f' being the source's where patched and x's elsewhere."""
    info = msgspec.structs.replace(sae.info, input_norm=norm)
    sae = SAE(sae.W_enc, sae.b_enc, sae.threshold, sae.W_dec, sae.b_dec, info)
    into, source = rows(1), rows(2)
    f, wanted = sae.encode(into), sae.encode(source)
    assert (f != wanted).any(dim=1).all()
    swap = Swap(3, into, source, sae)
    chosen = torch.arange(0, 128, 3)
    for features in (None, tuple(chosen.tolist())):
        new = wanted.clone()
        if features is not None:
            new = f.clone()
            new[:, chosen] = wanted[:, chosen]
        expected = sae.decode(new, of=into) + into - sae.decode(f, of=into)
        for at in range(5):
            found = swap.replacement(at, at, features)
            assert (found.layer, found.position) == (3, at)
            torch.testing.assert_close(found.residual, expected[at], atol=1e-4, rtol=1e-4)


def test_features_that_are_as_they_are_change_nothing_to_the_bit(sae: SAE) -> None:
    into = rows(3)
    same = Swap(3, into, into.clone(), sae)
    assert torch.equal(same.replacement(2, 2).residual, into[2])
    assert torch.equal(same.replacement(2, 2, (1, 2, 3)).residual, into[2])


def test_whole_residuals_are_those_of_the_source() -> None:
    into, source = rows(4), rows(5)
    assert torch.equal(Swap(0, into, source).replacement(1, 3).residual, source[3])


def record(tokens: list[str], direction: str = "denoising") -> Patching:
    plan = Plan(
        [Target(0), Target(7, (3,)), Target(7, (1, 2))],
        [Column(position=at, source=source) for at, source in enumerate((1, None, 0))],
    )
    metrics = [0.5, -3.0, 1.0, 0.0, 0.2, 0.1, 1.0, 0.25, -0.001]
    return msgspec.convert(
        {
            "clean": prompt(["x", "y"]),
            "corrupted": prompt(tokens),
            "answer": Answer(text=tokens[0], token_id=1),
            "wrong": Answer(text="b", token_id=2),
            "metric_of_clean": 1.0,
            "metric_of_corrupted": 0.0,
            "direction": direction,
            "kind": "features",
            "columns": plan.columns,
            "rows": plan.rows(metrics, Ends(1.0, 0.0)),
            "chat": False,
            "model": HOSTILE,
            "backend": "transformers",
            "engine": "none",
            "sae_input": "raw",
            "saes": [],
        },
        Patching,
    )


def test_the_strongest_come_first() -> None:
    cells = record(["a", "b", "c"]).strongest()
    assert [cell.recovered for cell in cells] == [-3.0, 1.0, 0.5, 0.2, 0.1, 0.0]
    corrupt = msgspec.structs.replace(record(["a", "b", "c"]), direction="noising")
    assert [cell.recovered for cell in corrupt.strongest()] == [-3.0, 0.0, 0.1, 0.2, 0.5, 1.0]


def test_a_record_is_read_as_it_was_written() -> None:
    one = record(["a", "b", "c"])
    assert msgspec.json.decode(msgspec.json.encode(one), type=Patching) == one


@needs_browser
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    file = tmp_path / "map.html"
    file.write_text(heat_page(record([HOSTILE, "\u202e evil", "c"])), encoding="utf-8")
    profile = tmp_path / "profile"
    profile.mkdir()
    with opened(file, profile) as page:
        cells = page.run("[...document.querySelectorAll('tbody tr')].map(r => r.innerText)")
        assert [row.split("\t") for row in cells] == [
            ["layer 0", "0.50", "–", "0.00", "1.00"],
            ["layer 7 [3]", "-3.00", "–", "0.20", "0.25"],
            ["layer 7, 2 features", "1.00", "–", "0.10", "0.00"],
        ]
        titles = page.run("[...document.querySelectorAll('td')].map(n => n.title)")
        assert "layer 7 [3], position 0" in titles[5]
        assert "logit difference -3.0000" in titles[5]
        colour = "getComputedStyle(document.querySelectorAll('tbody td')[4]).backgroundColor"
        assert page.run(colour) == "rgba(37, 99, 235, 0.8)"
        assert HOSTILE in page.run("document.querySelector('thead').textContent")
        assert page.run("typeof window.owned") == "undefined"
        assert (page.faults, page.requests) == ([], [file.as_uri()])


def test_the_page_allows_only_its_own_script() -> None:
    html = heat_page(record([HOSTILE, "b", "c"]))
    assert HOSTILE not in html
    assert html.count("<script") == 2
    policy = re.search(r'content="(default-src[^"]*)"', html)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    data = re.search(r'id="data">(.*)</script>', html)
    assert data is not None
    assert json.loads(data[1])["about"][0].startswith(HOSTILE)

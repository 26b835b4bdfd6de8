"""`neuroscope bench`, small: what it reports, and what it refuses. No figure is a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from neuroscope_vllm.cli.main import main
from tests.support.served import Served


def bench(*words: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, words)])


def report(*words: object) -> dict[str, Any]:
    done = bench(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_encode_tells_each_cell_against_its_floor() -> None:
    words = ("encode", "--device", "cpu", "--d-model", 64, "--width", "256,1024", "--rows", "1,8")
    told = report(*words)
    assert [(c["width"], c["rows"]) for c in told["cells"]] == [
        (256, 1),
        (256, 8),
        (1024, 1),
        (1024, 8),
    ]
    for cell in told["cells"]:
        floor = max(cell["bytes_floor_us"], cell["flops_floor_us"])
        assert cell["over_floor"] == pytest.approx(cell["us"] / floor, rel=0.05)
    # A row more costs its own bytes; four times the features four times the weights.
    one, eight, wide, _ = told["cells"]
    assert one["bytes_floor_us"] < eight["bytes_floor_us"] < wide["bytes_floor_us"]
    assert told["machine"]["cores"] >= 1
    assert "torch" in told["machine"]["versions"]


@pytest.mark.parametrize(
    ("follow", "against"), [("own", ()), ("all", ("--against", "sse-starlette"))]
)
def test_hub_books_balance(follow: str, against: tuple[str, ...]) -> None:
    load = ("--seconds", 3, "--readers", 20, "--events-per-second", 500, "--follow", follow)
    told = report("hub", *load, *against)
    books = told["hub"]["books"]
    assert books["balance"]
    assert books["failures"] == []
    assert books["published"] == books["received"] + sum(books["in_gaps"].values())
    assert books["counted_by_the_hub"] == books["in_gaps"]
    # Three seconds at some rate, for one reader each or for all of them.
    assert books["published"] > 500 * (20 if follow == "all" else 1)
    assert told["hub"]["rss_mb"]["max"] >= told["hub"]["rss_mb"]["before"] > 20
    assert ("sse-starlette" in told) == bool(against)


def test_hub_readers_that_can_not_keep_up_are_told_of_every_loss() -> None:
    # An eighth of 8 MiB has room for 100 requests; what they tell is more than the quarter that the
    # stream of all has.
    load = ("--seconds", 1, "--readers", 100, "--events-per-second", 8000, "--follow", "all")
    books = report("hub", *load, "--memory-mb", 8)["hub"]["books"]
    assert books["balance"]
    assert sum(books["in_gaps"].values()) > 0
    assert books["in_gaps"] == books["counted_by_the_hub"]


def test_latency_of_a_running_server(served: Served, tmp_path: Path) -> None:
    picture = tmp_path / "latency.svg"
    where = ("--url", served.chat, "--features-url", served.features, "--plot", picture)
    told = report("latency", *where, "--batch", "1,3", "--tokens", 8, "--rounds", 1)
    assert [row["batch"] for row in told["rows"]] == [1, 3]
    for row in told["rows"]:
        # All but the last token of each chat, which never ran.
        assert row["tokens"] == row["batch"] * 7
        # The next token's chunk comes later than the token's own.
        assert row["same_pass_ms"]["p50"] < row["wait_ms"]["p50"]
        assert row["same_pass_late_ms"]["min"] >= 0
    assert picture.read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("latency", "--url", "http://127.0.0.1:1"), "--url and --features-url together"),
        (
            ("latency", "--url", "http://127.0.0.1:1", "--features-url", "http://127.0.0.1:1"),
            "give the addresses of a running server",
        ),
        (("encode", "--rows", "1,two"), "1,two is no list of numbers"),
        (("encode", "--rows", "0"), "0 has a number below 1"),
        (("encode", "--plot", "floor.pdf"), "ends with neither .png nor .svg"),
        (("encode", "--device", "cuda"), "there is no CUDA device here"),
        (("hub", "--readers", "99999999"), "give fewer --readers"),
        (("overhead", "--model", "x", "--shape", "gemma-2-2b"), "exclude each other"),
    ],
)
def test_what_can_not_be_measured_is_refused_in_a_sentence(
    words: tuple[str, ...], complaint: str
) -> None:
    done = bench(*words)
    assert done.exit_code in (1, 2)
    assert complaint in " ".join(done.output.split())
    assert "Traceback" not in done.output

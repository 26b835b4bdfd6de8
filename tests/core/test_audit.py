"""The audit: spoil a correct set of events, and the right counter moves, and no other."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuroscope_vllm.core.audit import Answer, Audit, Verdict, audit
from neuroscope_vllm.core.fit import Judge, Published, published
from neuroscope_vllm.core.ranking import make_ranker
from neuroscope_vllm.core.sae.encoder import TopKEncoder
from neuroscope_vllm.core.sae.info import RMS
from tests.core.conftest import build_rows, build_sae

LAYERS = [5, 20]
ID = "chatcmpl-a"

prompts = st.lists(st.integers(0, 99), min_size=1, max_size=6)
generated = st.lists(st.integers(0, 99), min_size=1, max_size=6)
answers = st.builds(
    lambda prompt, choices: Answer(
        frozenset({ID}),
        prompt,
        dict(enumerate(choices)),
        texts={at: "".join(map(chr, ids)) for at, ids in enumerate(choices)},
    ),
    prompts,
    st.lists(generated, min_size=1, max_size=2),
)


def events_of(answer: Answer, layers: list[int] = LAYERS) -> list[dict[str, Any]]:
    """What a server that tells the truth publishes."""
    events: list[dict[str, Any]] = []
    for choice, ids in answer.choices.items():
        events.append({"event": "request", "request_id": ID, "choice": choice})
        context = [*answer.prompt, *ids]
        for position, token_id in enumerate(context):
            in_prompt = position < len(answer.prompt)
            events += [
                {
                    "event": "prompt" if in_prompt else "token",
                    "request_id": ID,
                    "choice": choice,
                    "position": position,
                    "token_index": None if in_prompt else position - len(answer.prompt),
                    "token_id": token_id,
                    "token": chr(token_id),
                    "layer": layer,
                    "features_at": None if position == len(context) - 1 else "self",
                }
                for layer in layers
            ]
        events.append({"event": "done", "request_id": ID, "choice": choice})
    return events


def counts(found: Audit) -> tuple[int, int, int]:
    return found.missing, found.duplicated, found.misattributed


def told(events: list[dict[str, Any]]) -> st.SearchStrategy[int]:
    """The place of one token event."""
    return st.sampled_from([i for i, e in enumerate(events) if e["event"] in ("prompt", "token")])


@given(answers, st.randoms())
def test_the_truth_passes_however_choices_and_layers_interleave(
    answer: Answer, random: Any
) -> None:
    events = events_of(answer)
    turns = [(e["choice"], e.get("layer")) for e in events]
    random.shuffle(turns)
    streams = {
        turn: iter([e for e in events if (e["choice"], e.get("layer")) == turn]) for turn in turns
    }
    found = audit(answer, [next(streams[turn]) for turn in turns], LAYERS)
    assert counts(found) == (0, 0, 0)
    featured = sum(len(answer.prompt) + len(ids) - 1 for ids in answer.choices.values())
    assert len(found.rows) == featured * len(LAYERS)


@given(answers, st.data())
def test_a_position_after_a_later_one_is_misattributed(answer: Answer, data: st.DataObject) -> None:
    events = events_of(answer, [20])
    places = [i for i, e in enumerate(events[:-1]) if "layer" in e and "layer" in events[i + 1]]
    at = data.draw(st.sampled_from(places))
    events[at : at + 2] = events[at + 1], events[at]
    assert counts(audit(answer, events, [20])) == (0, 0, 1)


@given(answers, st.data())
def test_another_text_is_misattributed(answer: Answer, data: st.DataObject) -> None:
    events = events_of(answer)
    tokens = [i for i, e in enumerate(events) if e["event"] == "token" and e["layer"] == LAYERS[0]]
    at = data.draw(st.sampled_from(tokens))
    events[at] = events[at] | {"token": events[at]["token"] + "!"}
    assert counts(audit(answer, events, LAYERS)) == (0, 0, 1)


@given(answers, st.data())
def test_cached_positions_are_missing_where_nothing_may_be_cached(
    answer: Answer, data: st.DataObject
) -> None:
    answer = dataclasses.replace(answer, may_cache=False)
    events = events_of(answer)
    prompt = [i for i, e in enumerate(events) if e["event"] == "prompt"]
    at = data.draw(st.sampled_from(prompt))
    events[at] = events[at] | {"cached": True}
    assert counts(audit(answer, events, LAYERS)) == (1, 0, 0)


@given(answers, st.data())
def test_a_dropped_event_is_missing(answer: Answer, data: st.DataObject) -> None:
    events = events_of(answer)
    del events[data.draw(told(events))]
    assert counts(audit(answer, events, LAYERS)) == (1, 0, 0)


@given(answers, st.data())
def test_a_repeated_event_is_duplicated(answer: Answer, data: st.DataObject) -> None:
    events = events_of(answer)
    events.append(events[data.draw(told(events))])
    assert counts(audit(answer, events, LAYERS)) == (0, 1, 0)


@given(answers, st.data(), st.sampled_from(["request_id", "token_id", "token_index", "event"]))
def test_an_event_of_something_else_is_misattributed(
    answer: Answer, data: st.DataObject, name: str
) -> None:
    events = events_of(answer)
    at = data.draw(told(events))
    other = {"request_id": "chatcmpl-b", "token_id": 100, "token_index": 77}
    swapped = {"prompt": "token", "token": "prompt"}[events[at]["event"]]
    events[at] = events[at] | {name: other.get(name, swapped)}
    found = audit(answer, events, LAYERS)
    assert counts(found) == (0, 0, 1)
    assert all(row.event is not events[at] for row in found.rows)


@given(answers, st.data(), st.sampled_from(["choice", "position"]), st.sampled_from([-1, 99]))
def test_an_event_of_nowhere_is_misattributed(
    answer: Answer, data: st.DataObject, name: str, value: int
) -> None:
    events = events_of(answer)
    events.append(events[data.draw(told(events))] | {name: value})
    assert counts(audit(answer, events, LAYERS)) == (0, 0, 1)


@given(answers, st.data(), st.booleans())
def test_lost_features_are_missing_gap_or_not(
    answer: Answer, data: st.DataObject, gap: bool
) -> None:
    events = events_of(answer)
    at = data.draw(told(events).filter(lambda i: events[i]["features_at"] is not None))
    events[at] = events[at] | {"features_at": None}
    if gap:
        position = events[at]["position"]
        events.append({"event": "gap", "request_id": ID, "from": position, "to": position + 1})
    assert counts(audit(answer, events, LAYERS)) == (1, 0, 0)


@given(answers)
def test_only_prompt_tokens_before_the_last_may_be_cached(answer: Answer) -> None:
    events = [
        e | {"features_at": None, "cached": True} if "layer" in e else e for e in events_of(answer)
    ]
    found = audit(answer, events, LAYERS)
    choices, prompt = len(answer.choices), len(answer.prompt)
    positions = sum(prompt + len(ids) for ids in answer.choices.values())
    assert found.cached == (prompt - 1) * choices * len(LAYERS)
    assert found.missing == (positions - prompt * choices) * len(LAYERS)
    assert not found.rows


def test_layers_that_nobody_knew_yet_are_missing() -> None:
    answer = Answer(frozenset({ID}), [1, 2], {0: [3]})
    events = [e | {"layer": None} if "layer" in e else e for e in events_of(answer, [20])]
    assert counts(audit(answer, events, [20])) == (3, 0, 0)


@given(answers, st.integers(0, 5))
def test_an_abandoned_answer_is_a_prefix_of_what_was_published(answer: Answer, read: int) -> None:
    events = events_of(answer)
    got = {choice: ids[:read] for choice, ids in answer.choices.items()}
    left = dataclasses.replace(answer, choices=got, complete=False)
    found = audit(left, events, LAYERS)
    assert counts(found) == (0, 0, 0)
    assert found.contexts == {c: [*answer.prompt, *ids] for c, ids in answer.choices.items()}


def test_what_an_abandoned_client_read_must_have_been_published() -> None:
    answer = Answer(frozenset({ID}), [1, 2], {0: [3, 4, 5]})
    events = events_of(answer, [20])
    longer = Answer(frozenset({ID}), [1, 2], {0: [3, 4, 5, 6]}, complete=False)
    # Position 4 was taken for the last one, which has no features, and 5 never came.
    assert counts(audit(longer, events, [20])) == (2, 0, 0)
    other = Answer(frozenset({ID}), [1, 2], {0: [3, 9]}, complete=False)
    assert counts(audit(other, events, [20])) == (0, 0, 1)


def test_only_a_faultless_verdict_is_clean() -> None:
    assert Verdict(requests=1, tokens=9, worst_relative_error=0.1).clean
    for name in ("missing", "duplicated", "misattributed", "wrong_features"):
        assert not Verdict(**{name: 1}).clean


# Features


class Setting:
    """Rows of an SAE, and what an encoder reports of them."""

    def __init__(self, k: int = 6, info: dict[str, Any] | None = None) -> None:
        self.sae = build_sae()
        if info is not None:
            changed = msgspec.structs.replace(self.sae.info, **info)
            zeros = torch.zeros_like(self.sae.threshold)
            self.sae = dataclasses.replace(self.sae, threshold=zeros, info=changed)
        self.residuals = build_rows(self.sae, 40)
        self.residuals[7] *= 100.0  # a sink
        ranker = make_ranker("activation", width=self.sae.width)
        ranker.mask[3] = True
        self.judge = Judge(self.sae, ranker, top_k=k, sink_norm=2000.0, tolerance=1e-3)
        top = TopKEncoder(self.sae, ranker, k).encode(self.residuals)
        self.events = [
            {
                "top_features": [
                    {"index": i, "activation": a, "score": s}
                    for i, a, s in zip(index, activation, score, strict=True)
                    if i >= 0 and row != 7
                ],
                "sink": row == 7,
                "l0": l0,
            }
            for row, (index, activation, score, l0) in enumerate(
                zip(*(column.tolist() for column in top), strict=True)
            )
        ]
        self.full = [i for i, e in enumerate(self.events) if len(e["top_features"]) == k]

    def rows(self) -> Published:
        return published(self.events, self.judge.top_k)

    def wrong(self) -> list[int]:
        return (~self.judge.fit(self.rows(), self.residuals).right).nonzero().flatten().tolist()


@pytest.fixture
def setting() -> Setting:
    made = Setting()
    assert len(made.full) > 5
    return made


def test_exact_features_fit(setting: Setting) -> None:
    fit = setting.judge.fit(setting.rows(), setting.residuals)
    assert setting.wrong() == []
    assert float(fit.error.max()) < 1e-4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda features: features[0].update(activation=features[0]["activation"] * 1.01),
        lambda features: features[2].update(activation=float("nan")),
        lambda features: features[2].update(activation=None),
        lambda features: features[1].update(score=features[1]["score"] + 1),
        lambda features: features[1].update(index=9999),
        lambda features: features[1].update(index=3),  # masked
        lambda features: features[1].update(features[0]),  # twice
        lambda features: features.reverse(),
        lambda features: features.pop(0),  # the best one left out
        lambda features: features.clear(),
    ],
)
def test_wrong_features_do_not_fit(setting: Setting, spoil: Any) -> None:
    row = setting.full[0]
    spoil(setting.events[row]["top_features"])
    assert setting.wrong() == [row]


@pytest.mark.parametrize(
    "info", [{"k": 4}, {"k": 20}, {"input_norm": "layer_norm"}, {"input_norm": RMS, "k": 9}]
)
def test_features_of_saes_that_are_more_than_a_threshold_fit(info: dict[str, Any]) -> None:
    setting = Setting(info=info)
    assert setting.wrong() == []
    assert float(setting.judge.fit(setting.rows(), setting.residuals).error.max()) < 1e-4
    setting.events[3]["l0"] += 1
    setting.events[5]["top_features"].pop(0)
    setting.events[8] = setting.events[9]
    assert setting.wrong() == [3, 5, 8]


def test_features_beyond_the_k_largest_do_not_fit() -> None:
    keeps_four, keeps_six = Setting(info={"k": 4}), Setting(info={"k": 6})
    six = [i for i, event in enumerate(keeps_six.events) if len(event["top_features"]) > 4]
    assert len(six) > 20
    for event in keeps_six.events:
        event["l0"] = min(event["l0"], 4)
    keeps_four.events = keeps_six.events
    assert keeps_four.wrong() == six


@pytest.mark.parametrize("off", [-1, 1, 999_999])
def test_another_l0_does_not_fit(setting: Setting, off: int) -> None:
    row = setting.full[0]
    setting.events[row]["l0"] += off
    assert setting.wrong() == [row]


def test_near_ties_may_trade_places_at_the_end(setting: Setting) -> None:
    row = setting.full[0]
    sae, residual = setting.sae, setting.residuals[row]
    *_, last = setting.events[row]["top_features"]
    # Another feature of the last one's direction, stronger by less than the tolerance.
    twin = next(
        i
        for i in range(sae.width)
        if i not in {f["index"] for f in setting.events[row]["top_features"]}
    )
    sae.W_enc[:, twin] = sae.W_enc[:, last["index"]]
    sae.threshold[twin] = sae.threshold[last["index"]]
    gap = sae.b_enc[last["index"]] + last["activation"] * 5e-4
    sae.b_enc[twin] = gap
    assert float(sae.encode(residual[None])[0, twin]) > last["activation"]
    setting.events[row]["l0"] += 1
    setting.events = [setting.events[row]]
    setting.residuals = setting.residuals[[row]]
    assert setting.wrong() == []
    sae.b_enc[twin] = gap + last["activation"] * 0.01
    assert setting.wrong() == [0]


def test_sinks_are_flagged_and_have_no_features(setting: Setting) -> None:
    setting.events[7]["sink"] = False
    assert setting.wrong() == [7]
    setting.events[7] = setting.events[8] | {"sink": True}
    assert setting.wrong() == [7]
    setting.events[7] = {"top_features": [], "sink": True, "l0": 0}
    setting.events[8] = {"top_features": [], "sink": True, "l0": 0}
    assert setting.wrong() == [8]


def test_a_shifted_row_is_recognised(setting: Setting) -> None:
    row = setting.full[0]
    setting.events[row] = setting.events[setting.full[1]]
    assert setting.wrong() == [row]
    stray = setting.rows().part(slice(row, row + 1))
    assert setting.judge.fits_another(stray, setting.residuals).tolist() == [True]
    others = torch.cat([setting.residuals[: setting.full[1]], setting.residuals[7:8]])
    assert setting.judge.fits_another(stray, others).tolist() == [False]
    everything = setting.judge.fits_another(setting.rows(), setting.residuals)
    assert everything.tolist() == [bool(event["top_features"]) for event in setting.events]

"""A worker's requests keep what they steer by, whoever shares the tables with them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import torch
from vllm import SamplingParams

from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.steering.catalogue import Catalogue, Site
from neuroscope_vllm.core.steering.settle import settle
from neuroscope_vllm.core.steering.spec import SteeringSpec
from neuroscope_vllm.engine.serving.steer_report import SpanSteering, steered_rows
from neuroscope_vllm.engine.serving.steer_rows import steer
from neuroscope_vllm.engine.serving.steer_tables import SteerTables
from neuroscope_vllm.engine.serving.steerer import Steerer
from neuroscope_vllm.engine.serving.step import StepView
from neuroscope_vllm.engine.vllm.ids import STEERING
from neuroscope_vllm.engine.vllm.steering import take_up

LAYER, D_MODEL, PROMPT = 5, 4, [1, 2, 3]
# Feature i reads and writes the i-th number of a row.
INFO = SAEInfo(source="s", format="t", architecture="jumprelu", d_model=D_MODEL, width=D_MODEL)
EYE, ZEROS = torch.eye(D_MODEL), torch.zeros(D_MODEL)
SAE_ = SAE(EYE, ZEROS, ZEROS, EYE, ZEROS, INFO)
RULE = {
    "when": {"feature": 0, "above": 1, "last": 5},
    "steer": [{"op": "add", "feature": 1, "value": 7}],
}


def new(name: str, spec: dict[str, Any]) -> Any:
    steering = settle(msgspec.convert(spec, SteeringSpec), Catalogue({LAYER: Site.of(SAE_, None)}))
    assert steering is not None
    params = SamplingParams()
    # Not before: where a test began an engine, what is given to SamplingParams is a client's.
    params.extra_args = {STEERING: steering.to_dict()}
    return SimpleNamespace(req_id=name, sampling_params=params, prompt_token_ids=PROMPT)


class Worker:
    def __init__(self, entries: int, sae: SAE = SAE_) -> None:
        self.tables = SteerTables({LAYER: None}, num_rows=8, d_model=D_MODEL, entries=entries)
        self.steerer = Steerer(self.tables, {LAYER: sae}, {}, {LAYER: 90.0})
        self.parts: list[SpanSteering] = []

    def step(self, rows: dict[str, tuple[int, list[float]]], *begin: Any) -> torch.Tensor:
        """Rows after the layer, of requests by name: position and row."""
        output = SimpleNamespace(finished_req_ids=(), scheduled_new_reqs=begin)
        take_up(self.steerer, output)
        count = len(rows)
        hidden = torch.tensor([row for _, row in rows.values()])
        positions = [position for position, _ in rows.values()]
        nothing = torch.zeros(count, dtype=torch.int32)
        view = StepView(list(rows), list(range(count + 1)), nothing, nothing, positions)
        self.steerer.prepared(view)
        steer(hidden, None, *self.tables.of_layer(LAYER))
        self.parts = self.steerer.found(view, lambda layer: hidden)
        self.steerer.ran()
        return hidden


def test_who_loses_its_entry_while_it_waits_keeps_what_its_rules_saw() -> None:
    add = {"steer": [{"op": "add", "feature": 2, "value": 3}]}
    worker = Worker(entries=1)
    met, quiet = [2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]
    ruled = new("ruled", {"rules": [RULE]})
    assert worker.step({"ruled": (3, met)}, ruled).tolist() == [met]  # not the token that meets it
    assert worker.step({"ruled": (4, quiet)}).tolist() == [[0, 7, 0, 0]]
    assert worker.step({"other": (0, quiet)}, new("other", add)).tolist() == [[0, 0, 3, 0]]
    assert worker.step({"ruled": (5, quiet)}).tolist() == [[0, 7, 0, 0]]
    assert worker.step({"other": (1, quiet)}).tolist() == [[0, 0, 3, 0]]
    assert worker.step({"ruled": (8, quiet)}).tolist() == [[0, 7, 0, 0]]
    assert worker.step({"ruled": (9, quiet)}).tolist() == [quiet]  # the last five are over
    # Nor does one take over what the other's saw.
    worker.step({"other": (2, quiet)})
    fresh = new("fresh", {"rules": [RULE]})
    assert worker.step({"fresh": (4, quiet)}, fresh).tolist() == [quiet]


def test_of_a_top_k_sae_one_feature_alone_is_edited_but_not_told() -> None:
    """Its activation depends on all the others."""
    add = new("a", {"steer": [{"op": "add", "feature": 2, "value": 3}]})
    top = SAE(EYE, ZEROS, ZEROS, EYE, ZEROS, msgspec.structs.replace(INFO, k=2))
    for sae, told in ((SAE_, [(LAYER, 2)]), (top, [])):
        worker = Worker(entries=1, sae=sae)
        assert worker.step({"a": (0, [0.0] * D_MODEL)}, add).tolist() == [[0, 0, 3, 0]]
        found = [(one.layer, slot.feature) for one in worker.parts for slot in one.slots]
        assert found == told


def test_what_drowns_every_feature_is_neither_read_nor_taken_away() -> None:
    """A row above the calibrated norm: `add` is done, what reads f finds 0."""
    edits = [{"op": "ablate", "feature": 0}, {"op": "add", "feature": 1, "value": 5}]
    sink, row = [100.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]
    worker = Worker(entries=2)
    a, b = (new(name, {"steer": edits, "rules": [RULE]}) for name in "ab")
    assert worker.step({"a": (3, sink), "b": (3, row)}, a, b).tolist() == [
        [100, 5, 0, 0],
        [0, 5, 0, 0],
    ]
    quiet = [0.0] * D_MODEL
    after = worker.step({"a": (4, quiet), "b": (4, quiet)}).tolist()
    assert after == [[0, 5, 0, 0], [0, 12, 0, 0]]  # the rule of b alone was met


def test_requests_of_unequal_slots_are_told_what_is_theirs() -> None:
    few = new("few", {"steer": [{"op": "add", "feature": 2, "value": 3}]})
    many = new("many", {"steer": [{"op": "scale", "feature": i, "value": 2} for i in range(3)]})
    worker = Worker(entries=2)
    rows = {"few": (0, [0.0] * D_MODEL), "many": (0, [1.0, 2.0, 3.0, 0.0])}
    assert worker.step(rows, few, many).tolist() == [[0, 0, 3, 0], [2, 4, 6, 0]]
    figures = [
        np.frombuffer(getattr(one, when), "<f4").tolist()
        for part in worker.parts
        for one in steered_rows(part, part.found.numpy())
        for when in ("before", "after")
    ]
    assert figures == [[0], [3], [1, 2, 3], [2, 4, 6]]

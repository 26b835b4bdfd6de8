"""The tap between vLLM's scheduler and us: what it keeps, and that it harms nobody."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.engine import FinishReason

from neuroscope_vllm.core import wire
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.sae.info import SAEInfo
from neuroscope_vllm.engine.serving import requests
from neuroscope_vllm.engine.serving.sites import SiteSettings
from neuroscope_vllm.engine.vllm.admission import admit, refuse_beams
from neuroscope_vllm.engine.vllm.ids import secret_of
from neuroscope_vllm.engine.vllm.scheduler import SchedulerTap
from neuroscope_vllm.engine.vllm.settings import WorkerSettings

CONFIG = SimpleNamespace(
    instance_id="i", parallel_config=SimpleNamespace(data_parallel_index=0), kv_transfer_config=None
)


class Scheduler:
    """What the tap wraps of vLLM's, with nothing behind it."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}

    def schedule(self, new: list[Any]) -> Any:
        return SimpleNamespace(scheduled_new_reqs=new)

    def update_from_output(self, scheduled: Any, outputs: list[Any]) -> Any:
        return {0: SimpleNamespace(outputs=outputs)}

    def finish_requests(self, request_ids: Any, status: Any) -> str:
        return "finished"


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


@pytest.fixture
def tap(scheduler: Scheduler, tmp_path: Path) -> SchedulerTap:
    info = SAEInfo(source="s", format="f", architecture="jumprelu", d_model=1, width=8)
    settings = WorkerSettings(
        [SiteSettings(20, "s", info, None)], f"ipc://{tmp_path}/none.sock", "m", Settings()
    )
    return SchedulerTap(scheduler, CONFIG, settings)  # type: ignore[arg-type]


def request(name: str, tokens: int = 3, **params: Any) -> Any:
    return SimpleNamespace(
        request_id=f"{name}-01234567",
        external_req_id=name,
        prompt_token_ids=range(tokens),
        sampling_params=SamplingParams(**params),
        arrival_time=0.0,
        trace_headers={"traceparent": "00-aa-bb-01"},
        lora_request=None,
        cache_salt=None,
        mm_features=None,
        resumable=False,
    )


def end(scheduler: Scheduler, name: str) -> None:
    output = SimpleNamespace(
        request_id=f"{name}-01234567",
        new_token_ids=[1],
        finish_reason=FinishReason.LENGTH,
        stop_reason=None,
    )
    scheduler.update_from_output(None, [output])


def resync(tap: SchedulerTap) -> list[str]:
    """Ids of what the tap would tell a hub that was away."""
    sent: list[wire.Message] = []
    tap.log.sender.put = sent.append  # type: ignore[assignment, method-assign]
    tap.log.resync()
    (message,) = sent
    wire.encode(message)
    assert isinstance(message, wire.Resync)
    return [one.started.request_id for one in message.live]


def test_the_trace_context_that_vllm_keeps_is_told(tap: SchedulerTap) -> None:
    tap.started(request("a"))
    assert tap.log.live["a-01234567"].started.traceparent == "00-aa-bb-01"


def test_ended_requests_are_kept_for_a_while(
    scheduler: Scheduler, tap: SchedulerTap, monkeypatch: pytest.MonkeyPatch
) -> None:
    tap.started(request("old"))
    end(scheduler, "old")
    tap.started(request("running"))
    assert resync(tap) == ["old", "running"]
    monkeypatch.setattr(requests, "ENDED_KEPT_S", -1.0)
    assert resync(tap) == ["running"]


@pytest.mark.parametrize(("bound", "value"), [("ENDED_KEPT", 2), ("ENDED_KEPT_TOKENS", 8)])
def test_what_is_kept_is_bounded(
    scheduler: Scheduler,
    tap: SchedulerTap,
    monkeypatch: pytest.MonkeyPatch,
    bound: str,
    value: int,
) -> None:
    monkeypatch.setattr(requests, bound, value)
    for name in "abcde":
        tap.started(request(name))
        end(scheduler, name)
    assert resync(tap) == ["d", "e"]


def test_a_request_larger_than_all_that_is_kept_ends(
    scheduler: Scheduler, tap: SchedulerTap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "ENDED_KEPT_TOKENS", 2)
    tap.started(request("large", tokens=9))
    end(scheduler, "large")
    assert resync(tap) == []


def test_what_can_not_be_told_harms_no_step(scheduler: Scheduler, tap: SchedulerTap) -> None:
    tap.started(SimpleNamespace())
    strange = SimpleNamespace(request_id="a-01234567")
    tap.started(request("a"))
    assert scheduler.update_from_output(None, [strange])[0].outputs == [strange]
    assert scheduler.schedule([strange]).scheduled_new_reqs == [strange]
    assert scheduler.finish_requests("a-01234567", "no status") == "finished"
    assert tap.log.sender.counters["messages_missed"] == 4
    assert resync(tap) == ["a"]


@pytest.mark.parametrize("value", [3, 1.5, "boom", ["a"], 2**62])
def test_what_we_note_in_extra_args_is_not_taken_from_clients(value: Any) -> None:
    params = SamplingParams()
    params.extra_args = {"neuroscope_n": value}
    with pytest.raises(ValueError, match=r"vllm_xargs.neuroscope_n is reserved"):
        admit(params)


def test_a_stream_secret_is_admitted_as_its_digest_alone() -> None:
    secret = "a-secret-of-one-stream"
    expected = hashlib.sha256(secret.encode()).digest()
    for given in ({"stream_secret": secret}, json.dumps({"stream_secret": secret})):
        params = SamplingParams(n=2, extra_args={"neuroscope": given})
        admit(params)
        assert secret not in repr(params)
        assert secret_of(params) == expected
        again = params.clone()
        admit(again)
        assert secret_of(again) == expected
    for forged in ({"sha256": "no hex"}, {"sha256": 7}, {"sha": "00"}):
        with pytest.raises(ValueError, match="neuroscope_secret is reserved"):
            # Where another test of this process loaded the plugin, the constructor admits.
            admit(SamplingParams(extra_args={"neuroscope_secret": forged}))
    with pytest.raises(ValueError, match="beam search can not be kept secret"):
        refuse_beams({"neuroscope": {"stream_secret": secret}})


def test_copies_of_admitted_params_are_admitted() -> None:
    params = SamplingParams(n=3)
    for _ in range(2):
        admit(params)
    assert params.extra_args == {"neuroscope_n": {"n": 3}}
    params.n = 1  # as vLLM makes the params of each choice
    admit(params)
    assert params.extra_args == {"neuroscope_n": {"n": 3}}

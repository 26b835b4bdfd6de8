"""`neuroscope doctor`: how a running server is."""

from __future__ import annotations

from typing import Any, NamedTuple

import httpx

from neuroscope_vllm.cli.doctor_check import Asked, Check, Section, cut
from neuroscope_vllm.cli.doctor_hub import hub_check
from neuroscope_vllm.cli.doctor_versions import OURS, installed

TIMEOUT_S = 5.0
LOSSES = (
    *("messages_dropped", "messages_missed", "messages_unencodable", "messages_malformed"),
    *("messages_failed", "rows_dropped", "rows_failed", "rows_held_too_long"),
    *("rows_of_unknown_request", "requests_failed", "tokens_missed", "tokens_of_unknown_request"),
    *("connections_refused", "senders_refused", "requests_refused", "readers_refused"),
    *("readers_of_one_key_refused", "steps_incomplete"),
    *("passed_refused", "ticks_failed", "record_requests_dropped", "record_requests_failed"),
    *(
        "otel_events_dropped",
        "otel_events_failed",
        "steering_refused",
        "cards_refused",
        "exports_refused",
    ),
)
"""Counters of senders and of the hub that stay at zero while nothing is lost."""
KEY_NEEDED = (401, 403)


class Running(NamedTuple):
    """What answers at the URL of the stream.

    Attributes:
        health: Of /health, which wants no key; None: no neuroscope answers.
        version, described: Of /version and /v1/features/describe; empty where a key is wanted.
        open, status: Whether the latter needs no key, and how it answered with the one given.
    """

    health: dict[str, Any] | None = None
    version: dict[str, Any] = {}  # noqa: RUF012  (read only)
    described: dict[str, Any] = {}  # noqa: RUF012
    open: bool = False
    status: int = 0


def look(url: str, api_key: str | None) -> Running:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    describe = f"{url}/v1/features/describe"
    try:
        with httpx.Client(timeout=TIMEOUT_S) as client:
            health = health_of(client, url)
            if health is None:
                return Running()
            version = client.get(f"{url}/version", headers=headers)
            bare = client.get(describe)
            described = client.get(describe, headers=headers)
            return Running(
                health=health,
                version=version.json() if version.status_code == 200 else {},
                described=described.json() if described.status_code == 200 else {},
                open=bare.status_code == 200,
                status=described.status_code,
            )
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, TypeError):
        return Running()


def health_of(client: httpx.Client, url: str) -> dict[str, Any] | None:
    """What /health of a neuroscope says, with or without a key; None: it is something else.

    Raises httpx.HTTPError, httpx.InvalidURL.
    """
    answer = client.get(f"{url}/health")
    try:
        told = answer.json() if answer.status_code in (200, 503) else None
    except ValueError:
        return None
    return told if isinstance(told, dict) and {"status", "armed", "reasons"} <= set(told) else None


def server_checks(asked: Asked, running: Running) -> list[Check]:
    section = Section(
        "server",
        *("server", "version", "keys", "armed", "senders", "self_test", "warnings"),
        *("cuda_graphs", "losses", "labels", "sink_norm", "chat", "model_name", "upstream", "hub"),
    )
    hub_check(section, asked.settings)
    if running.health is None:
        nothing = f"no neuroscope answers at {asked.url}"
        if asked.expected:
            section.fail(
                "server",
                f"{nothing}.",
                "Start one with neuroscope serve, or name its features port with --url.",
            )
        return section.done(nothing)
    section.ok("server", f"a neuroscope answers at {asked.url}")
    if running.version:
        _version(section, running.version)
    _keys(section, asked, running)
    if not running.described:
        return section.done("the server did not describe itself")
    try:
        _described(section, asked, running)
    except (LookupError, TypeError, AttributeError) as error:
        section.fail(
            "version",
            f"the server describes itself otherwise than this version reads it ({error!r}).",
            f"Run doctor of the {OURS} that runs there.",
        )
    return section.done("the server did not say")


def _described(section: Section, asked: Asked, running: Running) -> None:
    _armed(section, running)
    _senders(section, running.described)
    _warnings(section, running.described)
    _cuda_graphs(section, running.described)
    _losses(section, running.described)
    _coverage(section, running.described)
    _chat(section, asked, running.described)


def _version(section: Section, told: dict[str, Any]) -> None:
    from neuroscope_vllm.core.wire import WIRE_VERSION

    seen = f"{told.get('version')}, wire version {told['wire_version']}"
    if told["wire_version"] == WIRE_VERSION and told.get("version") in (installed(OURS), "unknown"):
        section.ok("version", f"{seen}, as here")
    else:
        section.warn(
            "version",
            f"the server is {seen}; here is {installed(OURS)}, wire version {WIRE_VERSION}.",
            f"Install the same {OURS} on both, and start the server again.",
        )


def _keys(section: Section, asked: Asked, running: Running) -> None:
    if running.status == 200 and asked.api_key and not running.open:
        section.ok("keys", "the key is accepted")
    elif running.status == 200:
        section.ok("keys", "no key is asked for here")
    elif running.status in KEY_NEEDED and asked.api_key:
        section.fail(
            "keys",
            f"the server refuses the key ({running.status}).",
            "Give one that it was started with: --api-key or NEUROSCOPE_API_KEY.",
        )
    elif running.status in KEY_NEEDED:
        section.fail(
            "keys",
            f"the server wants a key ({running.status}), and none was given.",
            "Give one with --api-key or NEUROSCOPE_API_KEY.",
        )
    else:
        section.fail(
            "keys",
            f"/v1/features/describe answers {running.status}.",
            "See the log of the side process, which has the reason.",
        )


def _armed(section: Section, running: Running) -> None:
    assert running.health is not None
    reasons, status = " ".join(running.health["reasons"]), running.health["status"]
    workers = [one["sender"] for one in running.described["senders"] if one["role"] == "worker"]
    if running.described["replay"]:
        section.skip("armed", "a recording is told again, without an engine")
    elif status == "ok":
        section.ok("armed", f"by {', '.join(workers)}")
    elif status == "starting":
        section.warn(
            "armed",
            reasons or "the server is starting.",
            "Wait until the model is loaded; if this stays, see the section plugin.",
        )
    else:
        section.fail(
            "armed",
            reasons or f"/health says {status}.",
            "See vLLM's log for the reason, and start the server again once it is mended.",
        )


def _senders(section: Section, described: dict[str, Any]) -> None:
    senders = described["senders"]
    lost = [one for one in senders if one["lost"]]
    for one in lost:
        section.fail(
            "senders",
            f"silent for {one['silent_s']:.0f} s.",
            "See whether its process lives and is not stopped; if it is gone, start the server"
            " again.",
            one["sender"],
        )
    if senders and not lost:
        section.ok(
            "senders", f"{len(senders)} heard within {max(s['silent_s'] for s in senders)} s"
        )


def _warnings(section: Section, described: dict[str, Any]) -> None:
    told = set()
    for one in described["senders"]:
        for test in one["self_test"]:
            told.add(test["warning"])
            _self_test(section, f"{one['sender']}, layer {test['layer']}", test)
    others = [text for text in described["warnings"] if text not in told]
    for text in others:
        section.warn("warnings", text, "Change what it names, or read features with it in mind.")
    if not others:
        section.ok("warnings", "no others" if described["warnings"] else "none")


def _self_test(section: Section, subject: str, test: dict[str, Any]) -> None:
    if test["failure"]:
        section.fail("self_test", *cut(test["failure"], "Start the server again."), subject)
    elif test["warning"]:
        section.warn(
            "self_test", *cut(test["warning"], "See that the SAE is of this model."), subject
        )
    else:
        figures = {"L0": test["l0"], "explained": test["explained_variance"]}
        shown = ", ".join(f"{name} {value:.3g}" for name, value in figures.items() if value)
        section.ok("self_test", f"{test['tokens']} tokens, {shown or 'no figures'}", subject)


def _cuda_graphs(section: Section, described: dict[str, Any]) -> None:
    for one in described["senders"]:
        if one["role"] != "worker" or one["runner"] == "transformers" or not one["cudagraph_mode"]:
            continue
        mode, device = one["cudagraph_mode"], one["device"]
        seen = f"{mode}, runner {one['runner']} on {device or 'an unnamed device'}"
        if mode != "NONE":
            section.ok("cuda_graphs", seen, one["sender"])
        elif device in ("", "cpu"):
            section.skip("cuda_graphs", seen, one["sender"])
        else:
            section.warn(
                "cuda_graphs",
                f"{seen} of {one['host']}, so every step pays for its launches.",
                "Leave --enforce-eager and cudagraph_mode out of vLLM's flags; we need neither.",
                one["sender"],
            )


def _losses(section: Section, described: dict[str, Any]) -> None:
    counted = {"the hub": described["counters"]}
    counted |= {one["sender"]: one["counters"] for one in described["senders"]}
    lost = {who: {n: c[n] for n in LOSSES if c.get(n)} for who, c in counted.items()}
    for who, counters in lost.items():
        if counters:
            seen = ", ".join(f"{name} {count:,}" for name, count in counters.items())
            section.warn(
                "losses",
                seen,
                "Readers were told, by gaps or errors; if it grows, see the logs, whether the side"
                " process has a core, and whether memory_mb and max_readers are enough.",
                who,
            )
    if not any(lost.values()):
        section.ok("losses", f"none in {described['counters'].get('requests', 0):,} requests")


def _coverage(section: Section, described: dict[str, Any]) -> None:
    for site in described["sites"]:
        subject = f"layer {site['layer']}"
        labels = [one for one in described["labellers"] if one["layer"] == site["layer"]]
        if labels:
            shown = ", ".join(f"{one['labeller']} {one['coverage'] or 0:.0%}" for one in labels)
            section.ok("labels", f"share of features labelled: {shown}", subject)
        else:
            section.warn(
                "labels",
                "there are none, so features are shown by index alone.",
                "Make some with neuroscope label, and start the server again.",
                subject,
            )
        if site["sink_norm"] is None:
            section.warn(
                "sink_norm",
                "the server has no cut for attention sinks, which needs a calibration.",
                "Make one with neuroscope calibrate, and start the server again.",
                subject,
            )
        else:
            section.ok(
                "sink_norm", f"{site['sink_norm']:.4g}, ranked by {site['ranking']}", subject
            )


def _chat(section: Section, asked: Asked, described: dict[str, Any]) -> None:
    if described["replay"]:
        for name in ("chat", "model_name", "upstream"):
            section.skip(name, "a recording is told again, without an engine")
        return
    headers = {"Authorization": f"Bearer {asked.api_key}"} if asked.api_key else {}
    with httpx.Client(timeout=TIMEOUT_S, headers=headers) as client:
        _own_chat(section, client, asked.chat_url, described["model"])
        _upstream(section, client, asked.url)


def _own_chat(section: Section, client: httpx.Client, url: str, model: str) -> None:
    try:
        health = client.get(f"{url}/health").status_code
        models = client.get(f"{url}/v1/models")
        ids = [one["id"] for one in models.json()["data"]] if models.status_code == 200 else []
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        section.fail(
            "chat",
            f"no OpenAI server answers at {url} ({type(error).__name__}).",
            "Name it with --chat-url, or start the server again if it ended.",
        )
        section.skip("model_name", "no OpenAI server answers")
        return
    if health == 200:
        section.ok("chat", f"{url} is healthy")
    else:
        section.fail(
            "chat",
            f"{url}/health answers {health}.",
            "See its log: an engine that died is mended by a new start.",
        )
    if models.status_code in KEY_NEEDED:
        section.skip("model_name", "the OpenAI server lists its models to those with its key")
    elif model in ids:
        section.ok("model_name", f"{model} is served and observed")
    else:
        section.fail(
            "model_name",
            f"features are of {model}, but {url} serves {', '.join(ids) or 'nothing'}.",
            "Name the OpenAI server that belongs to this stream with --chat-url.",
        )


def _upstream(section: Section, client: httpx.Client, url: str) -> None:
    """The page's chats go through the side process."""
    try:
        status = client.get(f"{url}/v1/models").status_code
    except httpx.HTTPError as error:
        status = type(error).__name__
    if status == 200:
        section.ok("upstream", "the side process reaches the OpenAI server")
    elif status == 503:
        section.skip("upstream", "the side process was given no OpenAI server to pass chats to")
    elif status in KEY_NEEDED:
        section.skip("upstream", "the OpenAI server lists its models to those with its key")
    else:
        section.fail(
            "upstream",
            f"the side process does not reach the OpenAI server ({status}), so the page can not"
            " chat.",
            "Give the side process the address of the OpenAI server with upstream.",
        )

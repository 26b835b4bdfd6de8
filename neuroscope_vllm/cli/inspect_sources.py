"""Where `neuroscope inspect` has a text's features from: a running server, or an engine here."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import click
import httpx
import msgspec

from neuroscope_vllm.cli.engines import chosen, engine_spec, start_engine
from neuroscope_vllm.cli.options import check_device
from neuroscope_vllm.cli.storm import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, VerifyError, refusal
from neuroscope_vllm.cli.tokenized import prompt_ids, token_texts
from neuroscope_vllm.cli.verify import ask_server
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.events import TokenEvent
from neuroscope_vllm.core.inspection.record import (
    Firings,
    Inspected,
    Inspection,
    Site,
    Token,
    of_events,
)

TRACE_TIMEOUT_S = 30
"""How long a trace may take to end after its answer; the hub waits 2 s for late rows."""


class Given(NamedTuple):
    """A text, and the file it is from; None: the command line."""

    text: str
    file: str | None

    @property
    def name(self) -> str:
        if self.file is not None:
            return "stdin" if self.file == "-" else self.file
        return repr(self.text if len(self.text) <= 40 else self.text[:39] + "…")


class Source(Protocol):
    """What knows the features of texts.

    Attributes:
        notes: What the user should know of all its answers.
    """

    notes: list[str]

    def inspect(self, given: Given) -> Inspected: ...


class Server:
    """A running server. Its labels, its ranking and its top k."""

    def __init__(
        self, url: str, api_key: str | None, chat: bool, top_k: int | None, layers: Sequence[int]
    ) -> None:
        """Raises click.ClickException: none there, or it does not observe what is asked for."""
        self._url, self._chat = url.rstrip("/"), chat
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        with _plain():
            description, served = ask_server(self._url, api_key)
        self._model = served["id"]
        self._special = frozenset(description.get("special_token_ids", ()))
        sites = description["sites"]
        observed = [site["layer"] for site in sites]
        if unknown := [layer for layer in layers if layer not in observed]:
            raise click.ClickException(
                f"the server at {self._url} does not observe layer {unknown[0]}; it observes"
                f" {', '.join(map(str, observed))}."
            )
        self._sites = [
            Site(
                layer=site["layer"],
                sae=site["sae"]["source"],
                ranking=site["ranking"],
                top_k=min(top_k or site["top_k"], site["top_k"]),
            )
            for site in sites
            if not layers or site["layer"] in layers
        ]
        if top_k is not None and any(site.top_k < top_k for site in self._sites):
            raise click.ClickException(
                f"the server reports {min(site.top_k for site in self._sites)} features a token,"
                f" not {top_k}; ask for fewer, or see more with --model and --sae."
            )
        self.notes: list[str] = []

    def inspect(self, given: Given) -> Inspected:
        with _plain():
            events = self._events(given)
        by_layer = {site.layer: site for site in self._sites}
        tokens = [token for token in of_events(events, self._special) if token.layer in by_layer]
        for token in tokens:
            del token.top_features[by_layer[token.layer].top_k :]
        return Inspected(
            Inspection(
                text=given.text,
                file=given.file,
                chat=self._chat,
                model=self._model,
                source=self._url,
                sites=self._sites,
                tokens=tokens,
                features=[],
            ),
            None,
        )

    def _events(self, given: Given) -> list[TokenEvent]:
        """The prompt's, after one more token was generated."""
        body: dict[str, Any] = {"model": self._model, "max_tokens": 1, "temperature": 0}
        # What vLLM has in its prefix cache would come without the features of this run.
        body["vllm_xargs"] = {"neuroscope": json.dumps({"prompt_features": "all"})}
        if self._chat:
            path = "/v1/chat/completions"
            body["messages"] = [{"role": "user", "content": given.text}]
        else:
            path = "/v1/completions"
            body["prompt"] = given.text
        timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        headers = {**self._headers, "X-Request-Id": f"inspect-{uuid.uuid4().hex}"}
        try:
            with httpx.Client(base_url=self._url, headers=headers, timeout=timeout) as client:
                answer = client.post(path, json=body)
                if answer.status_code != 200:
                    said = " ".join(refusal(answer).message.split())
                    raise click.ClickException(f"{given.name} can not be inspected: {said}")
                trace = _finished_trace(client, answer.json()["id"])
        except httpx.HTTPError as error:
            raise click.ClickException(
                f"the server at {self._url} broke off ({type(error).__name__}); see its log."
            ) from None
        if trace["events_kept"] < trace["events_total"]:
            raise click.ClickException(
                f"{given.name} has more features than the server keeps of a request; serve with a"
                " larger memory_mb, or give less text at once."
            )
        return [
            msgspec.convert(event, TokenEvent)
            for event in trace["events"]
            if event["event"] == "prompt"
        ]


def _finished_trace(client: httpx.Client, request_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + TRACE_TIMEOUT_S
    while time.monotonic() < deadline:
        answer = client.get(f"/v1/requests/{request_id}")
        # 404: the hub has not heard of it yet.
        if answer.status_code not in (200, 404):
            raise refusal(answer)
        choices = answer.json()["choices"] if answer.status_code == 200 else []
        if choices and choices[0]["finished"]:
            return choices[0]
        time.sleep(0.05)
    raise click.ClickException(
        f"vLLM answered request {request_id}, but the feature stream did not tell its end in"
        f" {TRACE_TIMEOUT_S} s; see /v1/features/describe of the server for problems."
    )


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """What `verify` reports as undecided is here an error like any other."""
    try:
        yield
    except VerifyError as error:
        raise click.ClickException(error.message) from None


class Offline:
    """An engine of our own. Labels and calibrations as a server would find them."""

    def __init__(
        self,
        model: str,
        backend: str | None,
        chat: bool,
        features: Sequence[int],
        everywhere: bool,
        flags: dict[str, Any],
    ) -> None:
        """
        Args:
            features: To be tracked on every token.
            everywhere: Whether to tell where the features that are shown fire besides.
            flags: Settings by name, and device and dtype for transformers.

        Raises click.ClickException and NeuroscopeError, one sentence each.
        """
        # Before torch is loaded: beside a server that leaves no core idle, threads that spin while
        # they wait for each other take several times as long.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

        from neuroscope_vllm.core.detokenize import special_ids
        from neuroscope_vllm.core.inspection.inspector import Inspector
        from neuroscope_vllm.core.labels import load_labels
        from neuroscope_vllm.core.launch import label_files
        from neuroscope_vllm.core.sae.observed import named

        self._chat, self._features, self._everywhere = chat, features, everywhere
        device, dtype = flags.pop("device"), flags.pop("dtype")
        path, settings = chosen(model, flags)
        settings = named(settings, path)
        self._backend = backend or _default_backend()
        check_device(self._backend, device, dtype)
        self._model = model
        asked = engine_spec(path, settings, self._backend, device=device, dtype=dtype)
        engine = self._engine = start_engine(asked)
        fast = getattr(engine.tokenizer, "backend_tokenizer", None)
        special = set(special_ids(fast)) or set(engine.tokenizer.all_special_ids)
        labels = label_files(settings, list(engine.sites))
        self._inspectors = {
            layer: Inspector(
                settings, number, layer, info, [load_labels(f) for f in labels[layer]], special
            )
            for number, (layer, info) in enumerate(engine.sites.items())
        }
        self.notes = []
        for layer, inspector in self._inspectors.items():
            inspector.check(features)
            if not inspector.calibrated:
                self.notes.append(
                    f"the SAE of layer {layer} has no calibration: features are ranked by"
                    " activation, and attention sinks are not recognised"
                )

    def inspect(self, given: Given) -> Inspected:
        from neuroscope_vllm.core.passes import FeaturePass

        ids = self._ids(given)
        texts = token_texts(self._engine.tokenizer, ids)
        tokens: list[Token] = []
        firings: Firings = {}
        features = []
        results = self._engine.run(FeaturePass(), [ids])
        for layer, inspector in self._inspectors.items():
            listed = FeaturePass.read(results[layer])
            found = inspector.tokens(listed, texts)
            shown = {f.index for token in found for f in token.top_features}
            wanted = {*self._features, *(shown if self._everywhere else ())}
            firings[layer] = inspector.firings(listed, wanted)
            features += [
                inspector.tracked(index, firings[layer][index], found) for index in self._features
            ]
            tokens += found
        tokens.sort(key=lambda token: (token.position, token.layer))
        record = Inspection(
            text=given.text,
            file=given.file,
            chat=self._chat,
            model=self._model,
            source=self._backend,
            sites=sorted((i.site for i in self._inspectors.values()), key=lambda s: s.layer),
            tokens=tokens,
            features=features,
        )
        return Inspected(record, firings)

    def close(self) -> None:
        self._engine.close()

    def _ids(self, given: Given) -> list[int]:
        ids = prompt_ids(self._engine.tokenizer, given.text, self._chat, self._model)
        if len(ids) > self._engine.max_tokens:
            raise ConfigError(
                f"{given.name} has {len(ids):,} tokens, but {self._model} takes"
                f" {self._engine.max_tokens:,}; give less text at once."
            )
        return ids


def _default_backend() -> str:
    """transformers starts in seconds, vLLM in a minute."""
    from importlib.util import find_spec

    return "transformers" if find_spec("transformers") else "vllm"

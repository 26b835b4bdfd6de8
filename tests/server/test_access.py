"""Who may read what: each cell of the README's table, and what it says around it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from neuroscope_vllm.core.access import SECRET_HEADER, KeyDigests, digest
from neuroscope_vllm.engine.fake import FakeEngine, Script
from neuroscope_vllm.server.sessions import MOST, SHARE
from tests.server.access import (
    ADMIN,
    KEYED_ROWS,
    METRICS,
    OPEN_ROWS,
    OTHER,
    SECRET,
    USER,
    Headers,
    bearer,
    secret,
    sign_in,
    status,
    table,
)
from tests.server.side import Side, http, start_side, wait_until
from tests.server.upstream import Upstream

COLUMNS, ROWS = table()
CELLS = [(row, column) for row in ROWS for column in COLUMNS]
ORIGIN = "https://app.example"
KEPT = ("plain", "guarded")
"""Names of a request without, and of one with a secret, of two choices."""
ALIASES = (
    "guarded",
    "chatcmpl-guarded",
    "chatcmpl-guarded-00000001",
    "chatcmpl-guarded-00000002",
)


def run_both(engine: FakeEngine, side: Side, headers: Headers) -> None:
    for choice in range(2):
        engine.run("chatcmpl-guarded", [1, 2], [3, 4], Script(choice=choice, secret=SECRET))
    engine.run("chatcmpl-plain", [1, 2], [3, 4])
    wait_until(lambda: len(listed(side, headers)) >= 3)


def listed(side: Side, headers: Headers) -> list[str]:
    found = side.get("/v1/requests", headers=headers).json()["data"]
    return [one["request_id"] for one in found if one["finished"]]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Iterator[Side]:
    side = start_side(tmp_path_factory.mktemp("open"), upstream=upstream.url)
    with FakeEngine(side.endpoint, top_k=4) as engine:
        side.wait_armed()
        run_both(engine, side, secret())
        yield side
    side.process.stop()


@pytest.fixture(scope="module")
def engine_of_keyed(keyed: Side) -> Iterator[FakeEngine]:
    with FakeEngine(keyed.endpoint, top_k=4) as engine:
        keyed.wait_armed()
        run_both(engine, keyed, bearer(ADMIN))
        yield engine


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Iterator[Side]:
    side = start_side(
        tmp_path_factory.mktemp("keyed"),
        upstream=upstream.url,
        keys=KeyDigests(
            admin=[digest("another-admin-key"), digest(ADMIN)],
            user=[digest(USER)],
            metrics=[digest(METRICS)],
        ),
        settings={"allowed_origins": [ORIGIN]},
    )
    yield side
    side.process.stop()


def of_request(name: str) -> list[tuple[str, str]]:
    steering = f"/v1/requests/{name}/steering"
    reading = [("GET", f"/v1/requests/{name}"), ("GET", f"/export/{name}")]
    return [*reading, ("PUT", steering), ("DELETE", steering)]


PROBES = {
    "page, `/health`, `/ready`": [
        ("GET", path) for path in ("/", "/static/js/app.js", "/health", "/ready")
    ],
    "labels, cards, `describe`, `/docs`": [
        ("GET", f"/v1/features/{path}") for path in ("labels", "describe", "5?weights=false")
    ]
    + [("GET", path) for path in ("/docs", "/openapi.json", "/version")],
    "all: stream, list": [("GET", "/v1/features/stream"), ("GET", "/v1/requests")],
    "a request it names": of_request("plain"),
    "one with a secret": of_request("guarded"),
    "chat, `/v1/models`": [
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
    ],
    "`/metrics`": [("GET", "/metrics")],
    "all else": [("GET", "/v1/whatever"), ("POST", "/debug")],
}


def test_the_table_is_the_one_that_is_tested():
    assert list(PROBES) == COLUMNS
    assert list(ROWS) == [*OPEN_ROWS, *KEYED_ROWS]


@pytest.mark.parametrize(("row", "column"), CELLS)
def test_cell(
    opened: Side,
    keyed: Side,
    engine_of_keyed: FakeEngine,
    upstream: Upstream,
    row: str,
    column: str,
):
    side = opened if row in OPEN_ROWS else keyed
    headers = (OPEN_ROWS | KEYED_ROWS)[row](side)
    expected = ROWS[row][COLUMNS.index(column)]
    for method, path in PROBES[column]:
        got = status(side, method, path, headers)
        if expected == "yes" and column == "all else":
            assert got in ("yes", "404"), path  # there is nothing, but it is let through
        else:
            assert got == expected, (method, path)
    name = {"a request it names": "plain", "one with a secret": "guarded"}.get(column)
    if name is not None:
        assert read_one(side, name, headers) == expected


def read_one(side: Side, name: str, headers: Headers) -> str:
    """ "yes" if the stream tells the request and ends, "404" if it waits."""
    params = {"request_id": name}
    with http.stream("GET", side.stream_url, params=params, headers=headers) as answer:
        if answer.status_code != 200:
            return str(answer.status_code)
        heard = b""
        try:
            timeout = {"read": 0.5, "connect": 20, "write": 20, "pool": 20}
            answer.request.extensions["timeout"] = timeout
            for chunk in answer.iter_bytes():
                heard += chunk
        except httpx.ReadTimeout:
            assert b"event:" not in heard
            return "404"
        assert heard.count(b"event: done") == (2 if name == "guarded" else 1)
        return "yes"


@pytest.mark.parametrize("name", ALIASES)
def test_no_alias_opens_a_secret_request(keyed: Side, engine_of_keyed: FakeEngine, name: str):
    path = f"/v1/requests/{name}"
    assert status(keyed, "GET", path, bearer(USER)) == "404"
    unknown = keyed.get(path + "x", headers=bearer(USER)).text
    assert keyed.get(path, headers=bearer(USER)).text == unknown.replace(name + "x", name)
    assert status(keyed, "GET", path, bearer(ADMIN)) == "yes"


def test_another_request_of_the_same_name_opens_nothing(keyed: Side, engine_of_keyed: FakeEngine):
    names: dict[str, list[str]] = {}

    def read(who: str, headers: Headers) -> None:
        names[who] = [
            e["internal_id"] for e in keyed.read("twice", headers=headers) if "internal_id" in e
        ]

    callers = {"user": bearer(USER), "owner": secret() | bearer(USER), "admin": bearer(ADMIN)}
    readers = [threading.Thread(target=read, args=one) for one in callers.items()]
    for reader in readers:
        reader.start()
    wait_until(
        lambda: (
            keyed.get("/v1/features/describe", headers=bearer(ADMIN)).json()["limits"]["readers"]
            >= 3
        )
    )
    hidden = engine_of_keyed.run("twice", [1, 2], [3, 4], Script(secret=SECRET))
    seen = engine_of_keyed.run("twice", [1, 2], [3, 4])
    for reader in readers:
        reader.join()
    assert set(names["user"]) == {seen}
    assert set(names["owner"]) == set(names["admin"]) == {seen, hidden}
    (choice,) = keyed.get("/v1/requests/twice", headers=bearer(USER)).json()["choices"]
    assert choice["internal_id"] == seen


def test_the_stream_of_all_leaves_secret_requests_out(opened: Side):
    with (
        FakeEngine(opened.endpoint, top_k=4) as engine,
        opened.open() as everybody,
        opened.open(headers=secret()) as owner,
        opened.open(headers=secret(OTHER)) as stranger,
    ):
        hidden = engine.run("all", [1, 2], [3], Script(secret=SECRET))
        seen = engine.run("all", [1, 2], [3])

        def until_done(events: Iterator[dict[str, str]]) -> set[str]:
            heard = set()
            for event in events:
                heard.add(event["internal_id"])
                if (event["event"], event["internal_id"]) == ("done", seen):
                    break
            return heard

        assert until_done(owner) == {hidden, seen}
        assert until_done(everybody) == until_done(stranger) == {seen}
    listed_ids = [one["internal_id"] for one in opened.get("/v1/requests").json()["data"]]
    assert seen in listed_ids
    assert hidden not in listed_ids
    assert opened.get("/v1/requests").json()["total"] == len(listed_ids)


def test_a_reader_that_comes_back_is_told_no_secret(keyed: Side, engine_of_keyed: FakeEngine):
    choices = keyed.get("/v1/requests/guarded", headers=bearer(ADMIN)).json()["choices"]
    first = choices[0]["events"][0]["id"]
    for headers in (bearer(USER), bearer(USER) | secret(OTHER)):
        resuming = {**headers, "Last-Event-ID": first}
        params = {"request_id": "guarded"}
        assert http.get(keyed.stream_url, params=params, headers=resuming).status_code == 204


WRONG: list[tuple[str, Headers, str]] = [
    ("basic", {"Authorization": f"Basic {ADMIN}"}, ""),
    ("bare", {"Authorization": ADMIN}, ""),
    ("digest", bearer(digest(ADMIN).hex()), ""),
    ("part", bearer(ADMIN[:-1]), ""),
    ("longer", bearer(ADMIN + "x"), ""),
    ("empty", {"Authorization": "Bearer"}, ""),
    ("header", {"X-Api-Key": ADMIN}, ""),
    ("cookie", {"Cookie": f"neuroscope-0={ADMIN}; session={ADMIN}"}, ""),
    ("secret", {"X-Neuroscope-Stream-Secret": ADMIN}, ""),
    ("query", {}, f"?api_key={ADMIN}&key={ADMIN}&token={ADMIN}"),
    ("latin", {"Authorization": "Bearer \xe9\xff"}, ""),
]


@pytest.mark.parametrize(
    ("headers", "query"), [one[1:] for one in WRONG], ids=[w[0] for w in WRONG]
)
def test_a_key_in_a_wrong_place_opens_nothing(keyed: Side, headers: Headers, query: str):
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    for method, path in (("GET", "/v1/requests"), ("GET", "/v1/requests/plain"), ("PUT", "/x")):
        answer = http.request(
            method, keyed.base + path + query, headers=raw, json={"api_key": ADMIN}
        )
        assert answer.status_code == 401, path
        assert answer.json()["error"]["type"] == "authentication_error"


def test_refusals_are_counted_and_a_good_key_still_works(keyed: Side, engine_of_keyed: FakeEngine):
    def counters() -> dict[str, int]:
        return keyed.get("/v1/features/describe", headers=bearer(ADMIN)).json()["counters"]

    before = counters()
    keyed.get("/v1/requests")
    keyed.get("/v1/requests", headers=bearer("wrong"))
    keyed.get("/v1/requests", headers=bearer(USER))
    after = counters()
    for kind in ("without_key", "keys", "rights"):
        name = f"refused_{kind}"
        assert after[name] == before.get(name, 0) + 1, name
        told = f'neuroscope_http_refused_total{{reason="{kind}"}} {after[name]}.0'
        assert told in keyed.get("/metrics", headers=bearer(ADMIN)).text
    assert keyed.get("/health").status_code == 200


def test_describe_tells_no_request(keyed: Side, engine_of_keyed: FakeEngine):
    told = keyed.get("/v1/features/describe", headers=bearer(USER))
    assert told.json()["access"] == {"keys": True, "lists": False, "session": False}
    assert not any(name in told.text for name in ("plain", "guarded", "twice"))


def test_one_key_takes_a_quarter_of_all_places(new_side: Callable[..., Side]):
    keys = KeyDigests([digest(ADMIN)], [digest(USER), digest("another-key-of-vllm")])
    side = new_side(keys=keys, settings={"max_readers": 8})
    admin, user, other = bearer(ADMIN), bearer(USER), bearer("another-key-of-vllm")
    session = sign_in(side, {"api_key": USER})

    def ask(headers: Headers) -> str:
        return status(side, "GET", "/v1/features/stream?request_id=x", headers)

    with side.open("x", headers=user), side.open("x", headers=session):
        assert ask(user) == ask(session) == ask(sign_in(side, {"api_key": USER})) == "429"
        with side.open("x", headers=other), side.open("x", headers=other):
            assert ask(other) == "429"
        with side.open(headers=admin), side.open(headers=admin), side.open(headers=admin):
            pass
        answer = side.get("/v1/features/stream?request_id=x", headers=user)
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert "with this key as may be, 1/4 of max_readers (8)" in answer.text
    wait_until(lambda: ask(user) == "yes")
    told = side.get("/metrics", headers=admin).text
    assert 'neuroscope_refused_at_limit_total{what="readers"} 0.0' in told
    refused = 'neuroscope_refused_at_limit_total{what="readers_of_one_key"}'
    assert float(told.partition(refused)[2].split()[0]) >= 5


def test_those_without_a_key_share_one_part_whatever_they_show(new_side: Callable[..., Side]):
    keys = KeyDigests([digest(ADMIN)], [digest(USER)])
    side = new_side(keys=keys, settings={"max_readers": 8})
    with FakeEngine(side.endpoint) as engine:
        side.wait_armed()
        engine.run("hidden", [1, 2], [3], Script(secret=SECRET))
        wait_until(lambda: "hidden" in listed(side, bearer(ADMIN)))
    shown = [(SECRET_HEADER, value) for value in (SECRET, OTHER)]
    path = "/v1/features/stream?request_id=x"
    session = sign_in(side, {"stream_secret": SECRET})
    with side.open("x", headers=secret()), side.open("x", headers=session):
        refused = side.get(path, headers=shown)
        assert refused.status_code == 429
        assert "are read without a key" in refused.text
        with side.open("x", headers=bearer(USER) | secret()):
            pass


def test_sessions_of_one_key_make_no_other_end(new_side: Callable[..., Side]):
    side = new_side(keys=KeyDigests([digest(ADMIN)], [digest(USER)]))
    admins, first = (sign_in(side, {"api_key": key}) for key in (ADMIN, USER))

    def knows(session: Headers) -> bool:
        return side.get("/v1/features/describe", headers=session).status_code == 200

    for _ in range(MOST // SHARE - 1):
        last = sign_in(side, {"api_key": USER})
    assert knows(first)
    last = sign_in(side, {"api_key": USER})
    assert [knows(one) for one in (admins, first, last)] == [True, False, True]
    assert "neuroscope_sessions_displaced_total 1.0" in side.get("/metrics", headers=admins).text


def test_a_metrics_key_begins_no_session(keyed: Side, engine_of_keyed: FakeEngine):
    answer = http.post(f"{keyed.base}/v1/session", json={"api_key": METRICS})
    assert answer.status_code == 403
    assert "for /metrics alone" in answer.json()["error"]["message"]
    assert "set-cookie" not in answer.headers


def test_chats_go_on_with_vllms_key_alone(keyed: Side, upstream: Upstream):
    def chat(headers: Headers) -> tuple[int, str | None]:
        upstream.seen.clear()
        url = keyed.base + "/v1/chat/completions"
        answer = http.post(url, json={"model": "m"}, headers=headers)
        return answer.status_code, upstream.seen[0].get("authorization") if upstream.seen else None

    assert chat(bearer(USER)) == (200, f"Bearer {USER}")
    assert chat(bearer(ADMIN)) == (401, None)
    session = sign_in(keyed, {"api_key": USER})
    assert chat(session) == (200, f"Bearer {USER}")
    assert chat(sign_in(keyed, {"api_key": ADMIN}, cookie=session)) == (200, f"Bearer {USER}")
    assert "cookie" not in upstream.seen[0]


def test_names_that_are_rebound_here_are_refused_without_keys_alone(opened: Side, keyed: Side):
    rebound = {"Host": "evil.example"}
    assert opened.get("/v1/requests", headers=rebound).status_code == 400
    assert keyed.get("/v1/requests", headers=rebound).status_code == 401
    assert keyed.get("/v1/requests", headers=rebound | bearer(ADMIN)).status_code == 200


def test_a_side_process_has_no_secret_of_its_parents(
    new_side: Callable[..., Side], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("VLLM_API_KEY", USER)
    monkeypatch.setenv("NEUROSCOPE_ADMIN_KEYS", ADMIN)
    monkeypatch.setenv("NEUROSCOPE_METRICS_KEYS", METRICS)
    side = new_side(keys=KeyDigests([digest(ADMIN)], [digest(USER)], [digest(METRICS)]))
    kept = Path(f"/proc/{side.process.pid}/environ").read_bytes()
    kept += (side.process.directory / "side.json").read_bytes()
    kept += Path(f"/proc/{side.process.pid}/cmdline").read_bytes()
    assert not any(one.encode() in kept for one in (USER, ADMIN, METRICS))

"""Callers who mean harm, or are broken: refused, counted, and the server is well."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from neuroscope_vllm.client.calls import quoted
from neuroscope_vllm.core.access import KeyDigests, digest
from neuroscope_vllm.engine.fake import FakeEngine, Script
from neuroscope_vllm.server.connection import PATIENCE_S
from neuroscope_vllm.server.guard import MAX_BODY, MAX_CHAT, MAX_HEAD, MAX_PARAMETERS, Refusals
from tests.server.access import ADMIN, USER, bearer
from tests.server.side import Side, http, start_side, wait_until

NOBODY = "http://127.0.0.1:1"
KEY = f"Authorization: Bearer {ADMIN}\r\n"
KEY_OF_USER = f"Authorization: Bearer {USER}\r\n"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    keys = KeyDigests([digest(ADMIN)], [digest(USER)])
    side = start_side(tmp_path_factory.mktemp("keyed"), keys=keys, upstream=NOBODY)
    yield side
    side.process.stop()


@pytest.fixture(scope="module")
def engine_of_keyed(keyed: Side) -> Iterator[FakeEngine]:
    with FakeEngine(keyed.endpoint, top_k=4) as engine:
        keyed.wait_armed()
        yield engine


@pytest.fixture(autouse=True)
def _still_well(keyed: Side, engine_of_keyed: FakeEngine) -> Iterator[None]:
    yield
    assert keyed.get("/health").status_code == 200
    assert keyed.get("/v1/requests", headers=bearer(ADMIN)).status_code == 200


def counted(side: Side, kind: str) -> int:
    told = side.get("/v1/features/describe", headers=bearer(ADMIN)).json()
    return told["counters"].get(f"refused_{kind}", 0)


def connect(side: Side, *data: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", side.port), timeout=20)
    for part in data:
        connection.sendall(part.encode())
    return connection


def raw(side: Side, target: str, more: str = "") -> bytes:
    """The whole answer to a request whose target no client may tidy up."""
    head = f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{more}\r\n"
    with connect(side, head) as connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(
    "target",
    [
        "/static/../v1/requests",
        "/static/..%2fv1/requests",
        "/static/%2e%2e/v1/requests",
        "/static/../../../../../../etc/passwd",
        "/static/%2e%2e%2f%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/static//etc/passwd",
        "/static/..\\..\\index.html",
        "/health/../v1/requests",
        "/./v1/requests",
        "//v1/requests",
        "/V1/requests",
        "/v1/requests?",
        "/v1%2frequests",
        "/v1/requests%00",
        "/v1/features/../requests",
        "http://127.0.0.1/v1/requests",
    ],
)
def test_no_path_leads_around_the_guard(keyed: Side, target: str):
    answer = raw(keyed, target)
    assert answer.split(b" ")[1] in (b"400", b"401", b"404"), answer[:200]
    assert b'"data"' not in answer
    assert b"root:" not in answer


@pytest.mark.parametrize(
    "name", ["a\r\nX-Injected: 1", "b\nX-Injected: 1", 'c"; x=', "d/../e", "é\x00"]
)
def test_ids_inject_no_header(keyed: Side, engine_of_keyed: FakeEngine, name: str):
    engine_of_keyed.run(name, [1], [2])

    def is_known() -> bool:
        kept = keyed.get("/v1/requests", headers=bearer(ADMIN)).json()["data"]
        return any(one["request_id"] == name for one in kept)

    wait_until(is_known)
    for path in ("/v1/requests/", "/export/"):
        answer = keyed.get(path + quoted(name), headers=bearer(ADMIN))
        # Paths of routes have no line breaks.
        assert answer.status_code == (404 if "\n" in name else 200), answer.text
        assert "x-injected" not in answer.headers
        assert not set("\r\n;") & set(answer.headers.get("content-disposition", "")[29:])


@pytest.mark.parametrize("size", [MAX_HEAD + 1, 200_000, 1 << 20])
@pytest.mark.parametrize("pieces", [1, 64])
def test_headers_have_an_end(keyed: Side, size: int, pieces: int):
    before = counted(keyed, "heads")
    head = f"GET /v1/requests HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{KEY}"
    filling = "".join(f"X-{i}: {'a' * (size // pieces)}\r\n" for i in range(pieces))
    answer = b""
    with connect(keyed, head) as connection:
        try:
            connection.sendall(filling.encode() + b"\r\n")
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert not answer or answer.startswith(b"HTTP/1.1 431")
    assert counted(keyed, "heads") == before + 1


def test_a_target_has_an_end(keyed: Side):
    answer = raw(keyed, "/v1/requests?" + "a" * (MAX_HEAD - 1000), f"X: {'b' * 2000}\r\n")
    assert answer.startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize(
    ("method", "path", "most"),
    [
        ("PUT", "/v1/requests/x/steering", MAX_BODY),
        ("POST", "/v1/session", MAX_BODY),
        ("POST", "/v1/chat/completions", MAX_CHAT),
        ("POST", "/v1/completions", MAX_CHAT),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_have_an_end(keyed: Side, method: str, path: str, most: int, chunked: bool):
    def chunks(size: int) -> Iterator[bytes]:
        for start in range(0, size, 1 << 16):
            yield b"{" * min(1 << 16, size - start)

    def send(size: int) -> int:
        content = chunks(size) if chunked else b"{" * size
        return http.request(
            method, keyed.base + path, headers=bearer(USER), content=content
        ).status_code

    before = counted(keyed, "bodies")
    assert send(most + 1) == 413
    assert counted(keyed, "bodies") == before + 1
    assert send(most) in (400, 502)  # no steering; no upstream


def test_a_body_without_end_is_cut_off(keyed: Side):
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n"
    chunk = "10000\r\n" + "a" * 65536 + "\r\n"
    with connect(keyed, head, "\r\n") as connection:
        try:
            for _ in range(10_000):
                connection.sendall(chunk.encode())
        except OSError:
            return
    pytest.fail("it took 625 MiB")


def test_a_body_behind_a_stream_ends_it(keyed: Side):
    before = counted(keyed, "bodies")
    head = "GET /v1/features/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n"
    with connect(keyed, head, KEY + "\r\n") as connection:
        chunk = ("10000\r\n" + "a" * MAX_BODY + "\r\n").encode()
        connection.sendall(2 * chunk)
        wait_until(lambda: counted(keyed, "bodies") == before + 1)
        while connection.recv(65536):
            pass
    told = lambda: keyed.get("/v1/features/describe", headers=bearer(ADMIN)).json()  # noqa: E731
    wait_until(lambda: told()["limits"]["readers"] == 0)


def test_who_never_finishes_is_cut_off(keyed: Side):
    before = counted(keyed, "slow")
    start = "GET /v1/requests HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    body = "PUT /v1/requests/x/steering HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n"
    chats = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n"
    user = f"Authorization: Bearer {USER}\r\n\r\n"
    slow = [
        connect(keyed),
        connect(keyed, "G"),
        connect(keyed, start + KEY),
        connect(keyed, body + KEY + "\r\n{"),
        connect(keyed, chats + user + "{"),
        connect(keyed, start + KEY + "\r\n", start + KEY),  # a second one, on the same connection
    ]
    dribbling = connect(keyed, start)
    began = time.monotonic()
    while time.monotonic() < began + PATIENCE_S + 10:
        try:
            dribbling.sendall(b"X: y\r\n")
        except OSError:
            break
        time.sleep(0.2)
    else:
        pytest.fail("a connection that dribbles stayed open")
    assert time.monotonic() > began + PATIENCE_S - 1
    for connection in slow:
        while connection.recv(65536):
            pass
        connection.close()
    dribbling.close()
    assert counted(keyed, "slow") >= before + 6
    # Who reads a stream is not slow.
    with keyed.open("nothing", headers=bearer(USER)) as events:
        assert events is not None


@pytest.mark.parametrize("path", ["/health", "/v1/requests"])
def test_a_cookie_that_python_unquotes_for_seconds_holds_nobody_up(keyed: Side, path: str):
    began = time.monotonic()
    quoted_long = 'Cookie: other="' + "\\" * 50_000 + '"\r\n'
    assert raw(keyed, path, quoted_long).split(b" ")[1] in (b"200", b"401")
    assert time.monotonic() - began < 5  # 14 s, if it is read


def test_a_query_has_few_parameters(keyed: Side):
    query = "&".join(f"a{at}=" for at in range(MAX_PARAMETERS))
    assert raw(keyed, f"/v1/features/stream?{query}", KEY).startswith(b"HTTP/1.1 400")
    assert raw(keyed, f"/v1/features/stream?{query}&b=", KEY).startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "[", "://", "http://127.0.0.1"])
def test_an_origin_that_is_none_is_another(keyed: Side, origin: str):
    head = "POST /v1/session HTTP/1.1\r\nHost: 127.0.0.1:1\r\nConnection: close\r\n"
    with connect(keyed, head, f"Origin: {origin}\r\nContent-Length: 2\r\n\r\n{{}}") as asking:
        assert asking.recv(65536).startswith(b"HTTP/1.1 403")


def test_what_is_no_http_is_counted(keyed: Side):
    before = counted(keyed, "malformed")
    for at in range(3):
        with connect(keyed, f"nonsense {at}\r\n\r\n") as connection:
            assert connection.recv(65536).startswith(b"HTTP/1.1 400")
    assert counted(keyed, "malformed") == before + 3


def test_few_requests_wait_behind_a_stream(keyed: Side):
    before = counted(keyed, "pipelined")
    head = f"GET /v1/features/stream?request_id=x HTTP/1.1\r\nHost: 127.0.0.1\r\n{KEY}\r\n"
    more = "GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with connect(keyed, head, more * 2000) as connection:
        try:
            while connection.recv(65536):
                pass
        except ConnectionResetError:
            pass
    assert counted(keyed, "pipelined") == before + 1


def test_a_client_that_leaves_in_its_body_is_no_fault(
    new_side: Callable[..., Side], capfd: pytest.CaptureFixture[str]
):
    side = new_side(upstream=NOBODY)
    for path in ("/v1/session", "/v1/chat/completions"):
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n"
        with connect(side, head, "{") as leaving:
            leaving.shutdown(socket.SHUT_WR)
            time.sleep(0.3)
    side.process.stop()
    said = capfd.readouterr().err
    assert "features of fake" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["X-Request-Id", "Accept", "Content-Type", "traceparent"])
def test_headers_of_a_chat_may_be_any_bytes(keyed: Side, name: str):
    more = f"{KEY_OF_USER}{name}: \u00e9\r\nConnection: close\r\n"
    with connect(keyed, f"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n{more}\r\n") as asking:
        assert asking.recv(65536).startswith(b"HTTP/1.1 502")  # nobody is there


def test_what_comes_behind_a_stream_has_an_end(keyed: Side):
    before = counted(keyed, "pipelined")
    head = f"GET /v1/features/stream?request_id=x HTTP/1.1\r\nHost: 127.0.0.1\r\n{KEY}\r\n"
    with connect(keyed, head) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        endless = b"GET / HTTP/1.1\r\n" + b"x-a: %b\r\n" % (b"b" * 4096) * 10_000
        with pytest.raises(OSError, match=r"reset|pipe"):
            connection.sendall(endless)
    assert counted(keyed, "pipelined") == before + 1


def test_answers_that_nobody_takes_hold_no_connection(keyed: Side, engine_of_keyed: FakeEngine):
    engine_of_keyed.run("not-taken", [1] * 5000, [2], Script(chunk=500))
    wait_until(
        lambda: keyed.get("/v1/requests/not-taken", headers=bearer(ADMIN)).status_code == 200
    )
    before = counted(keyed, "stuck")
    many = f"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n{KEY}\r\n" * 64
    long = f"GET /v1/requests/not-taken HTTP/1.1\r\nHost: 127.0.0.1\r\n{KEY}\r\n"
    with contextlib.ExitStack() as stack:
        for ask in (many, long):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
            one.connect(("127.0.0.1", keyed.port))
            one.sendall(ask.encode())
        wait_until(lambda: counted(keyed, "stuck") == before + 2, timeout=4 * PATIENCE_S)


@pytest.mark.parametrize("kind", ["text/event-stream", "application/x-ndjson"])
def test_streams_that_others_wait_behind_end_with_their_reader(keyed: Side, kind: str):
    def readers() -> int:
        described = keyed.get("/v1/features/describe", headers=bearer(USER)).json()
        return described["limits"]["readers"]

    wait_until(lambda: readers() == 0)
    more = f"{KEY}Accept: {kind}\r\n\r\n"
    head = f"GET /v1/features/stream?request_id=x HTTP/1.1\r\nHost: 127.0.0.1\r\n{more}"
    for _ in range(4):
        with connect(keyed, head * 3) as connection:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    wait_until(lambda: readers() == 0)


def test_websockets_are_refused(keyed: Side):
    more = "Upgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    more += "Sec-WebSocket-Version: 13\r\n"
    head = f"GET /v1/requests HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\n{more}\r\n"
    with connect(keyed, head) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")


def test_the_log_is_told_now_and_then_without_keys(caplog: pytest.LogCaptureFixture):
    counters: Counter[str] = Counter()
    refusals = Refusals(counters)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            refusals.add("keys", "10.0.0.5")
            refusals.add("slow", "10.0.0.6")
    assert counters == {"refused_keys": 100, "refused_slow": 100}
    wrong, slow = caplog.messages
    assert "for a wrong key, the last from 10.0.0.5" in wrong
    assert "10.0.0.6" in slow

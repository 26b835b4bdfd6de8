"""Sessions, origins and headers: what browsers add to the question who may read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import httpx
import pytest

from neuroscope_vllm.core.access import KeyDigests, digest
from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.server import sessions
from neuroscope_vllm.server.access import Access
from neuroscope_vllm.server.hub import Hub
from neuroscope_vllm.server.rights import ALL
from tests.server.access import ADMIN, USER, Headers, bearer, own, sign_in
from tests.server.side import Side, http, start_side

ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    side = start_side(
        tmp_path_factory.mktemp("keyed"),
        keys=KeyDigests([digest(ADMIN)], [digest(USER)]),
        settings={"allowed_origins": [ORIGIN]},
    )
    yield side
    side.process.stop()


def post_session(side: Side, body: object, **headers: str):
    answer = http.post(f"{side.base}/v1/session", json=body, headers=headers)
    http.cookies.clear()
    return answer


def test_the_cookie_is_for_this_page_alone(keyed: Side):
    first = post_session(keyed, {"api_key": USER}).headers["set-cookie"]
    second = post_session(keyed, {"api_key": USER}).headers["set-cookie"]
    name, _, value = first.partition(";")[0].partition("=")
    assert name == f"neuroscope-{keyed.port}"
    assert len(value) >= 43
    assert USER not in first
    assert first.partition(";")[0] != second.partition(";")[0]
    kinds = first.lower()
    assert "httponly" in kinds
    assert "samesite=strict" in kinds
    assert "secure" not in kinds
    behind_tls = post_session(keyed, {"api_key": USER}, **{"X-Forwarded-Proto": "https"})
    assert "; secure" in behind_tls.headers["set-cookie"].lower()


def test_who_says_that_there_is_tls_must_be_named(
    new_side: Callable[..., Side], monkeypatch: pytest.MonkeyPatch
):
    def cookie() -> str:
        """Of a session that a proxy on another address asks for."""
        proxy = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(transport=proxy, headers={"X-Forwarded-Proto": "https"}) as asking:
            url = f"{new_side(keys=KeyDigests([digest(ADMIN)])).base}/v1/session"
            return asking.post(url, json={"api_key": ADMIN}).headers["set-cookie"].lower()

    assert "; secure" not in cookie()
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.0/8")
    assert "; secure" in cookie()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"api_key": "wrong-key"}, 401),
        ({"stream_secret": "of-nothing-that-is-kept"}, 401),
        ({}, 401),
        ({"stream_secret": "short"}, 400),
        ({"api_key": USER, "other": 1}, 400),
        ({"api_key": 7}, 400),
        ([USER], 400),
    ],
)
def test_what_is_no_key_begins_no_session(keyed: Side, body: object, status: int):
    answer = post_session(keyed, body)
    assert answer.status_code == status
    assert "set-cookie" not in answer.headers
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("asked_by", "status"),
    [
        ({}, 403),  # a cookie, but no word of which page
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),  # the same site, another server
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 404),
        ({"Origin": ORIGIN}, 403),  # an allowed one has to show a key
    ],
)
def test_other_pages_change_nothing_with_a_cookie(keyed: Side, asked_by: Headers, status: int):
    cookie = {"Cookie": sign_in(keyed, {"api_key": USER})["Cookie"]}
    url = f"{keyed.base}/v1/requests/unknown/steering"
    assert http.delete(url, headers=cookie | asked_by).status_code == status
    assert http.delete(url, headers=cookie | own(keyed)).status_code == 404
    assert http.delete(url, headers=bearer(USER)).status_code == 404


def test_a_page_elsewhere_can_not_sign_a_browser_in(keyed: Side):
    for origin in ("http://evil.example", ORIGIN):
        answer = post_session(keyed, {"api_key": USER}, Origin=origin)
        assert answer.status_code == 403
        assert "set-cookie" not in answer.headers


def test_allowed_origins_ask_with_a_key_and_no_cookie(keyed: Side):
    def preflight(origin: str):
        headers = {
            "Origin": origin,
            "Access-Control-Request-Method": "GET",
            "Access-Control-Request-Headers": "authorization",
        }
        return http.options(keyed.stream_url, headers=headers).headers

    allowed = preflight(ORIGIN)
    assert allowed["access-control-allow-origin"] == ORIGIN
    assert "access-control-allow-credentials" not in allowed
    assert "access-control-allow-origin" not in preflight("https://other.example")
    told = keyed.get("/v1/features/describe", headers=bearer(USER) | {"Origin": ORIGIN})
    assert told.headers["access-control-allow-origin"] == ORIGIN
    url = f"{keyed.base}/v1/requests/unknown/steering"
    assert http.delete(url, headers=bearer(USER) | {"Origin": ORIGIN}).status_code == 404
    refused = keyed.get("/v1/features/describe", headers={"Origin": ORIGIN})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)


@pytest.mark.parametrize(
    "path", ["/", "/static/js/app.js", "/health", "/v1/requests", "/docs", "/x"]
)
def test_every_answer_has_strict_headers(keyed: Side, path: str):
    for headers in ({}, bearer(ADMIN)):
        answer = keyed.get(path, headers=headers)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        page = path == "/" or path.startswith("/static")
        assert answer.headers["cache-control"] == ("no-cache" if page else "no-store")


def test_a_session_lasts_longer_by_a_key_alone():
    access = Access(KeyDigests([], [digest(USER)]), Hub(Settings(), "fake"))
    began = access.sign_in(None, USER, None)
    for body in ((None, None), (None, "a-secret-of-one-stream")):
        assert access.sign_in(began, *body).ends_at == began.ends_at
    assert access.sign_in(began, USER, None).ends_at > began.ends_at


def test_sessions_end_and_are_bounded(monkeypatch: pytest.MonkeyPatch):
    counters: Counter[str] = Counter()
    kept = sessions.Sessions(counters)
    ids = [kept.begin(sessions.Session(ALL)) for _ in range(sessions.MOST + 1)]
    assert kept.get(ids[0]) is None
    assert kept.get(ids[1]) is not None
    assert counters == {"sessions_displaced": 1}
    monkeypatch.setattr(sessions.time, "monotonic", lambda: 1e12)
    assert kept.get(ids[1]) is None
    last = kept.begin(sessions.Session(ALL))
    assert len(kept._by_digest) == 1  # pyright: ignore[reportPrivateUsage]
    kept.end(last)
    assert kept.get(last) is None
    assert counters == {"sessions_displaced": 1}

"""The table of "Who may read what" in the README, and callers as its rows name them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx

from neuroscope_vllm.core.access import SECRET_HEADER
from tests.server.side import Side, http

README = Path(__file__).parents[2] / "README.md"
USER, ADMIN = "user-key-of-vllm", "admin-key-of-operator"
METRICS = "metrics-key-of-prometheus"
SECRET, OTHER = "a-secret-of-one-stream", "a-secret-of-no-stream"

Headers = dict[str, str]


def table() -> tuple[list[str], dict[str, list[str]]]:
    """Columns, and the cells of each row."""
    lines = README.read_text().splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("| who asks |"))
    rows: list[list[str]] = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[0][1:], {row[0]: row[1:] for row in rows[2:]}


def bearer(key: str) -> Headers:
    return {"Authorization": f"Bearer {key}"}


def secret(value: str = SECRET) -> Headers:
    return {SECRET_HEADER: value}


def sign_in(side: Side, *bodies: dict[str, str], cookie: Headers | None = None) -> Headers:
    """The cookie of a session that was begun with each of these in turn."""
    cookie = cookie or {}
    for body in bodies:
        answer = http.post(f"{side.base}/v1/session", json=body, headers=cookie | own(side))
        assert answer.status_code == 204, answer.text
        cookie = {"Cookie": answer.headers["set-cookie"].partition(";")[0]}
        http.cookies.clear()
    return cookie | own(side)


def own(side: Side) -> Headers:
    """As a browser says that the page of the same origin asks."""
    return {"Origin": side.base}


def ended(side: Side) -> Headers:
    cookie = sign_in(side, {"api_key": ADMIN})
    assert http.delete(f"{side.base}/v1/session", headers=cookie).status_code == 204
    return cookie


OPEN_ROWS: dict[str, Callable[[Side], Headers]] = {
    "nobody, on loopback, no keys there": lambda side: {},
    "a stream secret, no keys there": lambda side: secret(),
}
KEYED_ROWS: dict[str, Callable[[Side], Headers]] = {
    "no key": lambda side: {},
    "a wrong key": lambda side: bearer("wrong-key-of-nobody"),
    "a wrong stream secret alone": lambda side: secret(OTHER),
    "a stream secret alone": lambda side: secret(),
    "a user key": lambda side: bearer(USER),
    "a user key, with the secret": lambda side: bearer(USER) | secret(),
    "an admin key": lambda side: bearer(ADMIN),
    "a metrics key": lambda side: bearer(METRICS),
    "a session of a user key": lambda side: sign_in(side, {"api_key": USER}),
    "a session of a user key and the secret": lambda side: sign_in(
        side, {"api_key": USER, "stream_secret": SECRET}
    ),
    "a session of an admin key": lambda side: sign_in(side, {"api_key": ADMIN}),
    "a session of both keys": lambda side: sign_in(side, {"api_key": ADMIN}, {"api_key": USER}),
    "a session of a stream secret": lambda side: sign_in(side, {"stream_secret": SECRET}),
    "a session that has ended": ended,
}


def status(side: Side, method: str, path: str, headers: Headers) -> str:
    """ "yes", or the status of a refusal; of a stream only its begin is read."""
    content = b"{}" if method in ("POST", "PUT") else None
    with http.stream(method, side.base + path, headers=headers, content=content) as answer:
        code = answer.status_code
        if code >= 400 and code != 409:
            answer.read()
            _check_refusal(answer)
        return "yes" if code in (200, 204, 409) else str(code)


def _check_refusal(answer: httpx.Response) -> None:
    """Each has OpenAI's shape, and no key or secret in it."""
    assert answer.json()["error"]["message"], answer.text
    assert ("www-authenticate" in answer.headers) == (answer.status_code == 401)
    assert not any(word in answer.text for word in (USER, ADMIN, METRICS, SECRET, OTHER))

"""Who asks, and whether that is enough for what is asked: keys, stream secrets, sessions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from starlette.requests import HTTPConnection
from starlette.types import Scope

from neuroscope_vllm.core.access import SECRET_HEADER, KeyDigests, digest, is_among
from neuroscope_vllm.server.errors import ApiError
from neuroscope_vllm.server.hub import Hub
from neuroscope_vllm.server.rights import Rights
from neuroscope_vllm.server.sessions import Session, Sessions

KEYLESS = b""
"""`Rights.who` of all that show a stream secret alone."""
MOST_SECRETS = 16
"""That one caller may show at a time."""


class Need(Enum):
    """What a path asks of its caller."""

    NOTHING = auto()
    KEY = auto()
    """Any key: nothing there is of a request."""
    REQUEST = auto()
    """A key, or the secret of a request that is kept; the route looks which requests it reads."""
    CHAT = auto()
    """A key of vLLM's own, if it has any."""
    METRICS = auto()
    """A key for the metrics, or an admin's."""
    ADMIN = auto()


_NEEDS = {
    Need.NOTHING: {"/", "/health", "/ready", "/v1/session"},
    Need.KEY: {"/docs", "/openapi.json", "/version"},
    Need.REQUEST: {"/v1/features/stream"},
    Need.CHAT: {"/v1/models", "/v1/completions", "/v1/chat/completions"},
    Need.METRICS: {"/metrics"},
}
_BELOW = {
    "/static/": Need.NOTHING,
    "/v1/features/": Need.KEY,
    "/v1/requests/": Need.REQUEST,
    "/export/": Need.REQUEST,
}


def need_of(path: str) -> Need:
    """Paths that are not named here are an admin's."""
    for need, paths in _NEEDS.items():
        if path in paths:
            return need
    return next((need for start, need in _BELOW.items() if path.startswith(start)), Need.ADMIN)


@dataclass(frozen=True, slots=True)
class Caller:
    """Attributes:
    session: The one that its cookie names, if that is how it is known.
    authorization: What vLLM is shown for it.
    """

    rights: Rights
    session: Session | None = None
    authorization: str | None = field(default=None, repr=False)


class Refusal(ApiError):
    """`kind` is that of the counter: refused_<kind>."""

    def __init__(self, kind: str, status: int, message: str, code: str | None = None) -> None:
        super().__init__(status, message, code=code)
        self.kind = kind


def no_key(message: str = "this needs a key, and none was given") -> Refusal:
    how = "send it as `Authorization: Bearer <key>`, or sign in on the page at /."
    return Refusal("without_key", 401, f"{message}; {how}", "missing_api_key")


def wrong_key() -> Refusal:
    message = "the key is none of this server's; give one of vLLM's --api-key list, or an admin's."
    return Refusal("keys", 401, message, "invalid_api_key")


def for_metrics_alone() -> Refusal:
    return Refusal(
        "rights", 403, "this key is for /metrics alone; give a user's key, or an admin's."
    )


def not_an_admin(rights: Rights, what: str = "this") -> Refusal:
    if not rights.names:
        return no_key()
    return Refusal("rights", 403, f"{what} is for admin keys; name a request with request_id.")


class Access:
    """The keys, and the sessions that were begun with them."""

    def __init__(self, keys: KeyDigests, hub: Hub) -> None:
        self.keys = keys
        self.sessions = Sessions(hub.counters)
        self._hub = hub

    def caller(self, asked: HTTPConnection) -> Caller:
        """Raises Refusal: What it shows is wrong, or not enough for this path."""
        shown = _digests(asked.headers.getlist(SECRET_HEADER))
        authorization = asked.headers.get("authorization")
        need = need_of(asked.scope["path"])
        caller = _by_session(self.sessions.get(asked.cookies.get(cookie_name(asked.scope))))
        if not self.keys:  # on loopback only
            rights = replace(caller.rights, lists=True, names=True)
            caller = Caller(rights, caller.session, authorization or caller.authorization)
        elif authorization is not None and need is not Need.NOTHING:
            caller = self._by_key(authorization)
        rights = replace(caller.rights, shown=caller.rights.shown | shown)
        caller = replace(caller, rights=self._sharing(rights))
        if self.keys:
            self._check(need, caller)
        return caller

    def sign_in(self, before: Session | None, key: str | None, secret: str | None) -> Session:
        """A session that has what `before` had, and what these give; only a key makes it last
        longer. Raises Refusal."""
        had = before or Session(Rights())
        rights, vllm_key = had.rights, had.vllm_key
        if key is not None:
            given, is_vllms = self._rights_of(key)
            if self.keys and not given.names:
                raise for_metrics_alone() if given.metrics else wrong_key()
            rights = _both(rights, given)
            vllm_key = key if is_vllms or not self.keys else vllm_key
        if secret is not None:
            rights = replace(rights, shown=rights.shown | _digests([secret]))
        if self.keys and not rights.names and not self._opens_one(rights):
            raise no_key("no request that is kept here has this stream secret")
        if len(rights.shown) > MOST_SECRETS:
            raise _too_many_secrets()
        rights = self._sharing(rights)
        return Session(rights, vllm_key) if key else Session(rights, vllm_key, had.ends_at)

    def _by_key(self, authorization: str) -> Caller:
        scheme, _, key = authorization.partition(" ")
        rights, is_vllms = self._rights_of(key.strip())
        if scheme.lower() != "bearer" or not (rights.names or rights.metrics):
            raise wrong_key()
        return Caller(rights, None, authorization if is_vllms else None)

    def _rights_of(self, key: str) -> tuple[Rights, bool]:
        """And whether it is one of vLLM's."""
        shown = digest(key)
        admin, user = is_among(shown, self.keys.admin), is_among(shown, self.keys.user)
        metrics = admin or is_among(shown, self.keys.metrics)
        who = shown if user and not admin else None
        names = admin or user
        return Rights(everything=admin, lists=admin, names=names, metrics=metrics, who=who), user

    def _sharing(self, rights: Rights) -> Rights:
        """Who shows no key could give any number of secrets."""
        return replace(rights, who=KEYLESS) if self.keys and not rights.names else rights

    def _check(self, need: Need, caller: Caller) -> None:
        rights = caller.rights
        if need is Need.NOTHING or (need is Need.METRICS and rights.metrics):
            return
        if not rights.names and not (need is Need.REQUEST and self._opens_one(rights)):
            raise for_metrics_alone() if rights.metrics else no_key()
        if need in (Need.ADMIN, Need.METRICS) and not rights.lists:
            raise not_an_admin(rights)
        if need is Need.CHAT and self.keys.user and caller.authorization is None:
            raise no_key("chats need one of vLLM's own keys, which an admin key is not")

    def _opens_one(self, rights: Rights) -> bool:
        """Whether a secret it showed is one of a request that is kept."""
        secrets = [trace.secret for trace in self._hub.traces if trace.secret is not None]
        return any(map(rights.may_read, secrets))


def _by_session(session: Session | None) -> Caller:
    if session is None:
        return Caller(Rights())
    key = session.vllm_key
    return Caller(session.rights, session, None if key is None else f"Bearer {key}")


def _both(one: Rights, other: Rights) -> Rights:
    everything = one.everything or other.everything
    return Rights(
        everything=everything,
        lists=one.lists or other.lists,
        names=one.names or other.names,
        metrics=one.metrics or other.metrics,
        shown=one.shown | other.shown,
        who=None if everything else other.who or one.who,
    )


def _digests(shown: Iterable[str]) -> frozenset[bytes]:
    found = frozenset(map(digest, shown))
    if len(found) > MOST_SECRETS:
        raise _too_many_secrets()
    return found


def _too_many_secrets() -> Refusal:
    return Refusal("secrets", 400, f"at most {MOST_SECRETS} stream secrets can be shown at a time.")


def cookie_name(scope: Scope) -> str:
    """Browsers hand cookies to all ports of a host, and each may have a server of ours."""
    return f"neuroscope-{(scope.get('server') or ('', 0))[1]}"

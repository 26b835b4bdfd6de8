"""What `neuroscope doctor` finds: a record a check, gathered by section."""

from __future__ import annotations

from typing import Literal

import msgspec

from neuroscope_vllm.core.config import Settings

Verdict = Literal["ok", "warning", "failure", "not_applicable"]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at.

    Attributes:
        name: The same in every version, and in every run at least once.
        subject: What it is about where there are several, for example an SAE.
        seen: What was found, or why it was not looked at.
        remedy: One sentence; of a warning or a failure, always.
    """

    section: str
    name: str
    verdict: Verdict
    seen: str
    subject: str | None = None
    remedy: str | None = None


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be looked at.

    Attributes:
        model: Folder or hub id; None: not given.
        settings: None: they could not be resolved.
        url, chat_url: Of the side process and of the OpenAI API, without a slash at the end.
        expected: Whether a server was named that must answer.
    """

    model: str | None
    backend: str
    settings: Settings | None
    url: str
    chat_url: str
    api_key: str | None
    expected: bool

    @property
    def observing(self) -> Settings | None:
        """The settings, if they name an SAE."""
        return self.settings if self.settings is not None and self.settings.configured else None


class Section:
    """Gathers the checks of one section, each of its names at least once."""

    def __init__(self, name: str, *names: str) -> None:
        self._name = name
        self._names = names
        self._checks: list[Check] = []

    def ok(self, name: str, seen: str, subject: str | None = None) -> None:
        self._add(name, "ok", seen, subject, None)

    def warn(self, name: str, seen: str, remedy: str, subject: str | None = None) -> None:
        self._add(name, "warning", seen, subject, remedy)

    def fail(self, name: str, seen: str, remedy: str, subject: str | None = None) -> None:
        self._add(name, "failure", seen, subject, remedy)

    def skip(self, name: str, reason: str, subject: str | None = None) -> None:
        self._add(name, "not_applicable", reason, subject, None)

    def done(self, reason: str = "") -> list[Check]:
        """All checks, in the order of the names; those that were not made for this `reason`."""
        made = {check.name for check in self._checks}
        for name in self._names:
            if name not in made:
                self.skip(name, reason)
        return sorted(self._checks, key=lambda check: self._names.index(check.name))

    def _add(
        self, name: str, verdict: Verdict, seen: str, subject: str | None, remedy: str | None
    ) -> None:
        check = Check(
            section=self._name,
            name=name,
            verdict=verdict,
            seen=" ".join(seen.split()),
            subject=subject,
            remedy=remedy,
        )
        self._checks.append(check)


def cut(error: Exception | str, otherwise: str) -> tuple[str, str]:
    """A sentence of ours as what was seen and what to do, which stands after its last semicolon;
    `otherwise` where it says nothing of that."""
    sentence = " ".join(str(error).split())
    seen, semicolon, remedy = sentence.rpartition("; ")
    if not semicolon:
        return sentence, otherwise
    return f"{seen}.", remedy[:1].upper() + remedy[1:]

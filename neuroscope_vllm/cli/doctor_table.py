"""`neuroscope doctor` for people: a table by section, or plain lines where no terminal is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuroscope_vllm.cli.doctor_check import Check, Verdict

MARKS: dict[Verdict, tuple[str, str]] = {
    "ok": ("✓ ok", "blue"),
    "warning": ("! warning", "bold yellow"),
    "failure": ("✗ failure", "bold red reverse"),
    "not_applicable": ("- n/a", "dim"),
}
"""A symbol and a word each; the colours only repeat them."""

SHOWN = 3
"""Names of checks that one reason kept from being made; --json has all."""


def print_checks(checks: Sequence[Check]) -> None:
    console = Console(highlight=False)
    for section, found in groupby(checks, key=lambda check: check.section):
        if console.is_terminal:
            console.print(_table(section, list(found)))
        else:
            for line in _lines(section, list(found)):
                console.out(line, highlight=False)
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in MARKS}
    shown = ", ".join(f"{MARKS[verdict][0]}: {count}" for verdict, count in counts.items())
    console.out(shown, highlight=False)


def _table(section: str, checks: list[Check]) -> Table:
    table = Table(title=section, title_justify="left", title_style="bold", box=None, padding=(0, 1))
    table.show_header = False
    table.add_column(no_wrap=True, min_width=9)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for names, check in _merged(checks):
        word, style = MARKS[check.verdict]
        seen = Text(_seen(check), style="dim" if check.verdict == "not_applicable" else "")
        if check.remedy:
            seen.append(f"\n→ {check.remedy}", style="bold")
        table.add_row(Text(word, style=style), names, seen)
    return table


def _lines(section: str, checks: list[Check]) -> Iterator[str]:
    yield section
    for names, check in _merged(checks):
        yield f"  {MARKS[check.verdict][0]:<9}  {names}: {_seen(check)}"
        if check.remedy:
            yield f"{'':<13}→ {check.remedy}"


def _seen(check: Check) -> str:
    text = f"{check.subject}: {check.seen}" if check.subject else check.seen
    # What comes from servers and files is not to move the cursor.
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _merged(checks: list[Check]) -> Iterator[tuple[str, Check]]:
    """Checks with their names; those that one reason kept from being made are one."""

    def reason(check: Check) -> object:
        skipped = check.verdict == "not_applicable" and check.subject is None
        return check.seen if skipped else id(check)

    for _, group in groupby(checks, key=reason):
        found = list(group)
        names = [check.name for check in found]
        more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN + 1 else names[SHOWN:]
        yield ", ".join([*names[:SHOWN], *more]), found[0]

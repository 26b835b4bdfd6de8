"""`neuroscope doctor` for people: a table by section, or plain lines where no terminal is."""

from __future__ import annotations

from collections import Counter
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
NAME_WIDTH = 18


def print_checks(checks: Sequence[Check]) -> None:
    console = Console(highlight=False)
    for section, found in groupby(checks, key=lambda check: check.section):
        if console.is_terminal:
            console.print(_table(section, list(found)))
        else:
            for line in _lines(section, list(found)):
                console.out(line, highlight=False)
    counts = Counter(check.verdict for check in checks)
    shown = ", ".join(f"{word}: {counts[verdict]}" for verdict, (word, _) in MARKS.items())
    console.out(shown, highlight=False)


def _table(section: str, checks: list[Check]) -> Table:
    table = Table(title=section, title_justify="left", title_style="bold", box=None, padding=(0, 1))
    table.show_header = False
    table.add_column(no_wrap=True, width=9)
    table.add_column(width=NAME_WIDTH)
    table.add_column(overflow="fold", ratio=1)
    for names, check, said in _merged(checks):
        word, style = MARKS[check.verdict]
        seen = Text(said, style="dim" if check.verdict == "not_applicable" else "")
        if check.remedy:
            seen.append(f"\n→ {check.remedy}", style="bold")
        table.add_row(Text(word, style=style), names, seen)
    return table


def _lines(section: str, checks: list[Check]) -> Iterator[str]:
    yield section
    for names, check, said in _merged(checks):
        yield f"  {MARKS[check.verdict][0]:<9}  {names}: {said}"
        if check.remedy:
            yield f"{'':<13}→ {check.remedy}"


def _merged(checks: list[Check]) -> Iterator[tuple[str, Check, str]]:
    """Checks of a section, their names, and what was seen; those that one reason kept from being
    made are one. What all are about is said once, by the first."""
    subjects = {check.subject for check in checks if check.subject}

    def reason(check: Check) -> object:
        skipped = check.verdict == "not_applicable" and check.subject is None
        return check.seen if skipped else id(check)

    for _, group in groupby(checks, key=reason):
        found = list(group)
        names = [check.name for check in found]
        more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN + 1 else names[SHOWN:]
        first = found[0]
        said = f"{first.subject}: {first.seen}" if first.subject in subjects else first.seen
        if subjects == {first.subject}:
            subjects = set()
        yield ", ".join([*names[:SHOWN], *more]), first, _printable(said)


def _printable(text: str) -> str:
    """What comes from servers and files is not to move the cursor."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)

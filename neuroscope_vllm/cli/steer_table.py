"""`neuroscope steer` in a terminal: two answers side by side, or a row a strength."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuroscope_vllm.cli.inspect_table import printable
from neuroscope_vllm.cli.steer_record import FeatureEffect, Moved, Result, SideBySide, Sweep
from neuroscope_vllm.core.labels import clean_label
from neuroscope_vllm.core.steering.effect import Activity, parting

NONE = "–"
SWEEP_COLUMNS = (
    "changed: share of tokens to be put in, taken out or replaced to get the unsteered answer;"
    " perplexity: under the unsteered model; distinct: pairs of tokens."
)
NEW = "yellow"
"""What the answer has from where it parts from the other."""


def print_record(record: SideBySide | Sweep) -> None:
    if isinstance(record, Sweep):
        _print_sweep(Console(), record)
    else:
        _print_side_by_side(Console(), record)


def _print_side_by_side(console: Console, record: SideBySide) -> None:
    one, other = record.unsteered, record.steered
    console.print(_edits(other))
    table = Table(expand=True)
    table.add_column("unsteered", ratio=1, overflow="fold")
    table.add_column("steered", ratio=1, overflow="fold")
    same = parting(one.text, other.text)
    table.add_row(_answer(one.text, same), _answer(other.text, same))
    console.print(table)
    if other.features:
        console.print(_activity(one, other))
    console.print(Text(_parting(other), style="dim"))
    console.print(
        Text(
            f"Perplexity under the unsteered model: {_number(one.perplexity)} unsteered,"
            f" {_number(other.perplexity)} steered. Distinct pairs of tokens:"
            f" {_share(one.distinct_2)} and {_share(other.distinct_2)}.",
            style="dim",
        )
    )
    _print_notes(console, [other])


def _print_sweep(console: Console, record: Sweep) -> None:
    taken = [one.result for one in record.strengths if one.result is not None]
    for effect in taken[0].features[:1]:
        console.print(Text(f"{_name(effect)}, on generated tokens: mean (largest)", style="bold"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("value", "before", "after", "changed", "perplexity", "distinct"):
        table.add_column(name, justify="right", no_wrap=True)
    answers = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    answers.add_column(justify="right", no_wrap=True)
    answers.add_column(overflow="fold")
    plain = record.unsteered
    table.add_row("unsteered", *_row(plain))
    answers.add_row("unsteered", _answer(plain.text, None))
    for one in record.strengths:
        table.add_row(f"{one.value:g}", *(_row(one.result) if one.result else [NONE] * 5))
        if one.result is not None:
            answer = _answer(one.result.text, parting(plain.text, one.result.text))
        else:
            answer = Text(printable(one.refused or ""), style="red")
        answers.add_row(f"{one.value:g}", answer)
    console.print(table)
    console.print(Text(SWEEP_COLUMNS, style="dim"))
    console.print(answers)
    _print_notes(console, taken)


def _row(result: Result) -> tuple[str, ...]:
    moved = result.features[0].generated if result.features else Moved(None, None)
    return (
        _active(moved.before),
        _active(moved.after),
        _share(result.changed),
        _number(result.perplexity),
        _share(result.distinct_2),
    )


def _edits(result: Result) -> Text:
    """What the server applies."""
    parts = []
    for edit in result.edits:
        what = f"{edit['layer']}:{edit.get('feature', edit.get('direction'))}"
        value = f" {edit['value']:g}" if "value" in edit else ""
        where = "" if edit["positions"] == "all" else f" on {edit['positions']} tokens"
        parts.append(f"{edit['op']} {what}{value}{where}")
    return Text(printable("; ".join(parts) or "nothing is edited"), style="bold")


def _answer(text: str, same: int | None) -> Text:
    if same is None:
        return Text(_lines(text))
    return Text(_lines(text[:same])).append(_lines(text[same:]), style=NEW)


def _lines(text: str) -> str:
    """Printable, line by line."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _activity(one: Result, other: Result) -> Table:
    table = Table(title="activation, mean (largest)", title_justify="left")
    table.add_column("feature", overflow="fold", ratio=1)
    for name in ("tokens", "unsteered", "before", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    for plain, effect in zip(one.features, other.features, strict=True):
        phases = (
            ("prompt", plain.prompt, effect.prompt),
            ("generated", plain.generated, effect.generated),
        )
        for at, (phase, was, now) in enumerate(phases):
            cells = (_active(activity) for activity in (was.after, now.before, now.after))
            table.add_row(Text(_name(effect) if at == 0 else ""), phase, *cells)
    return table


def _parting(result: Result) -> str:
    if result.parts_at is None:
        return f"Both answers are the same {len(result.token_ids)} tokens."
    return (
        f"The answers part at token {result.parts_at} of {len(result.token_ids)};"
        f" {result.changed:.0%} of the tokens would have to change to get the other."
    )


def _print_notes(console: Console, results: Sequence[Result]) -> None:
    doses: dict[str, float] = {}
    for layer, dose in (pair for result in results for pair in result.doses.items()):
        doses[layer] = max(dose, doses.get(layer, 0.0))
    for layer, dose in doses.items():
        line = f"Largest change of layer {layer}: {dose:g} of its usual residual norm."
        console.print(Text(line, style="dim"))
    for warning in dict.fromkeys(text for result in results for text in result.warnings):
        console.print(Text(f"Warning: {printable(warning)}", style="yellow"))


def _name(effect: FeatureEffect) -> str:
    label = clean_label(effect.label or "(no label)")
    return f"[{effect.layer}:{effect.index}] {label}{' (unreliable)' * effect.unreliable}"


def _active(activity: Activity | None) -> str:
    return NONE if activity is None else f"{activity.mean:.3g} ({activity.max:.3g})"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"

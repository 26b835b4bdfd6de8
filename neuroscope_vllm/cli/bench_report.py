"""What the `neuroscope bench` commands share: sizes that are asked for, and where a report goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from neuroscope_vllm.cli.machine import in_a_line
from neuroscope_vllm.cli.saving import save
from neuroscope_vllm.core.errors import ConfigError

STDOUT = "-"

Report = dict[str, Any]


class Sizes(click.ParamType[tuple[int, ...]]):
    """Positive whole numbers with commas between them, as in 1,8,32."""

    name = "N[,N]…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(int(size) for size in str(value).split(","))
        except ValueError:
            self.fail(f"{value} is no list of numbers as in 1,8,32.", param, ctx)
        if min(sizes) < 1:
            self.fail(f"{value} has a number below 1.", param, ctx)
        return sizes


def together(ctx: click.Context, param: click.Parameter, given: Any) -> tuple[int, ...]:
    """An option of `Sizes` that may be given several times, as one list."""
    return tuple(size for sizes in given for size in sizes)


def report_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """--json and --plot; the command calls `deliver`."""
    plot = click.option(
        "--plot",
        type=click.Path(path_type=Path, dir_okay=False),
        callback=_drawable,
        help="Draw it to a .png or .svg.",
    )
    as_json = click.option(
        "--json",
        "as_json",
        is_flag=False,
        flag_value=STDOUT,
        metavar="[FILE]",
        help="JSON on stdout, or to FILE beside the table.",
    )
    return as_json(plot(command))


def _drawable(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    if path is None:
        return None
    if path.suffix.lower() not in (".png", ".svg"):
        raise click.BadParameter(f"{path} ends with neither .png nor .svg.", ctx, param)
    from neuroscope_vllm.core.pictures import check_pictures

    try:
        check_pictures()
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    return path


def deliver(
    report: Report,
    as_json: str | None,
    plot: Path | None,
    table: Callable[[Report], None],
    draw: Callable[[Report, Any], None],
) -> None:
    """Print and write a report that has a `machine`.

    Args:
        as_json: STDOUT, a file's name or None.
        plot: Where to write a picture, .png or .svg.
        table: Prints the report.
        draw: Draws it on a matplotlib Axes.
    """
    from neuroscope_vllm.cli.supervise import console

    if as_json == STDOUT:
        click.echo(json.dumps(report))
    else:
        table(report)
        console.print(in_a_line(report["machine"]), soft_wrap=True)
    if as_json not in (None, STDOUT):
        save(Path(as_json), json.dumps(report, indent=1).encode() + b"\n", "--json")
    if plot is not None:
        from neuroscope_vllm.cli.bench_plot import picture

        save(plot, picture(report, plot.suffix.lower()[1:], draw), "--plot")

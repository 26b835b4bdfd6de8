"""`neuroscope steer`: what steering does to an answer."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from neuroscope_vllm.cli.options import api_key_option
from neuroscope_vllm.core.json_text import to_json

if TYPE_CHECKING:
    from neuroscope_vllm.cli.steer_record import SideBySide, Sweep

OPS = ("add", "clamp", "scale", "ablate")

HELP = """Show what steering does to the answer to PROMPT, by a running server.

\b
  neuroscope steer "What is gravity?" --feature 4521 --value 80
  neuroscope steer "What is gravity?" --feature 20:4521 --unit max --sweep -1,0,0.5,1,2
  neuroscope steer "What is gravity?" --preset calm

The prompt is answered twice, one after the other: steered and not. Shown are both answers, where
they part, and of each edited feature the activation before and after the edit; special tokens and
attention sinks are left out of those. Perplexity is that of the answer under the unsteered model:
it tells how much of the model's own language is left.

--sweep answers with each of several strengths, at the same time, and shows a table of effect.
Requests that share batches are rounded a little differently, so in bfloat16 even a strength of 0
may turn a greedy answer.

The temperature is 0 unless you give another, so both answers differ by steering alone; then no seed
is sent. With a --temperature above 0 both are drawn with the same --seed. (On a CPU, vLLM 0.32 dies
of a request with a seed whose prompt is longer than one step.)

Rules of the operator's steering file act on all requests, the unsteered one too.

--json prints one object: asked, unsteered, and steered, or with --sweep strengths (value, and
result or refused). An answer has request_id, text, token_ids, finish_reason, perplexity,
distinct_2, parts_at, changed, features (layer, index, label, unreliable, and for prompt and
generated tokens before and after: mean, max, tokens), edits, doses and warnings.
"""


@click.command("steer", help=HELP)
@click.argument("prompt")
@click.option("--feature", metavar="[LAYER:]INDEX", help="Feature to edit.")
@click.option("--direction", metavar="NAME", help="Direction to add, of the server's file.")
@click.option(
    "--op", type=click.Choice(OPS), default="add", show_default=True, help="What --feature gets."
)
@click.option("--value", type=float, help="How strongly; not with ablate.")
@click.option(
    "--unit",
    type=click.Choice(["raw", "max"]),
    default="raw",
    show_default=True,
    help="Unit of values: the residual's own, or the feature's calibrated maximum.",
)
@click.option(
    "--positions",
    type=click.Choice(["all", "prompt", "generated"]),
    default="all",
    show_default=True,
    help="Tokens that are edited.",
)
@click.option(
    "--edit",
    "edits",
    multiple=True,
    metavar="JSON",
    help='One edit more, as in a request: \'{"op": "ablate", "feature": 12}\'. May be repeated.',
)
@click.option("--preset", "presets", multiple=True, help="Preset of the server's steering file.")
@click.option(
    "--sweep", "values", metavar="V,V,…", help="Strengths for --feature or --direction, in a table."
)
@click.option("--system", help="System message.")
@click.option("--completion", is_flag=True, help="PROMPT is text to go on with, not a chat.")
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0))
@click.option(
    "--seed", default=0, show_default=True, type=int, help="With a --temperature above 0."
)
@click.option(
    "--url", default="http://127.0.0.1:8080", show_default=True, help="vLLM's own server."
)
@click.option(
    "--features-url",
    default="http://127.0.0.1:8081",
    show_default=True,
    help="Server's feature stream.",
)
@api_key_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
@click.pass_context
def command(
    context: click.Context,
    prompt: str,
    edits: tuple[str, ...],
    presets: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    _check_usage(context, bool(edits or presets), options)
    for name, text in (("PROMPT", prompt), ("--system", options["system"] or "")):
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise click.UsageError(f"{name} is not text in UTF-8; give text.")
    given = [_edit(text) for text in edits]
    record = asyncio.run(_asked(prompt, _own(options), given, list(presets), options))
    if as_json:
        click.echo(to_json(record))
        return
    from neuroscope_vllm.cli.steer_table import print_record

    print_record(record)


def _check_usage(context: click.Context, others: bool, options: dict[str, Any]) -> None:
    """Raises click.UsageError."""

    def said(*names: str) -> list[str]:
        typed = ParameterSource.COMMANDLINE
        return [name for name in names if context.get_parameter_source(name) == typed]

    feature, direction = options["feature"] is not None, options["direction"] is not None
    if feature and direction:
        raise click.UsageError("--feature and --direction are two edits; give one with --edit.")
    if not feature and (stray := said("op", "unit")):
        raise click.UsageError(f"--{stray[0]} is for --feature; put it into the JSON of --edit.")
    if not feature and not direction:
        if stray := said("value", "values", "positions"):
            flag = "sweep" if stray[0] == "values" else stray[0]
            raise click.UsageError(f"--{flag} is for --feature or --direction; give one.")
        if not others:
            raise click.UsageError("say how to steer: --feature, --direction, --edit or --preset.")
    elif options["values"] is not None:
        if options["value"] is not None:
            raise click.UsageError("--value is one strength and --sweep several; give one of them.")
        if options["op"] == "ablate":
            raise click.UsageError("--op ablate has no strength; sweep --op scale or clamp.")
    elif options["value"] is None and (direction or options["op"] != "ablate"):
        raise click.UsageError("give a strength with --value, or several with --sweep.")
    _number(options["temperature"], "--temperature")
    if options["completion"] and options["system"] is not None:
        raise click.UsageError("--system is for chats; leave out it or --completion.")
    if said("seed") and options["temperature"] == 0:
        raise click.UsageError("--seed needs a --temperature above 0; at 0 nothing is drawn.")


def _own(options: dict[str, Any]) -> dict[str, Any] | None:
    """The edit of --feature or --direction, as requests carry it. Raises click.UsageError."""
    edit: dict[str, Any] = {}
    if options["direction"] is not None:
        edit |= {"op": "direction", "direction": options["direction"]}
    elif options["feature"] is not None:
        layer, colon, index = options["feature"].rpartition(":")
        if not index.isdecimal() or (colon and not layer.isdecimal()):
            raise click.UsageError(
                f"--feature {options['feature']} is not [LAYER:]INDEX, as in 4521 or 20:4521."
            )
        edit |= {"op": options["op"], "feature": int(index)}
        if colon:
            edit["layer"] = int(layer)
    else:
        return None
    if options["value"] is not None:
        edit["value"] = _number(options["value"], "--value")
    for name, usual in (("unit", "raw"), ("positions", "all")):
        if options[name] != usual:
            edit[name] = options[name]
    return edit


def _edit(text: str) -> dict[str, Any]:
    """Raises click.UsageError. What is in it is the server's to judge."""
    try:
        edit = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"--edit {text} is not JSON ({error}).") from None
    if not isinstance(edit, dict):
        raise click.UsageError(f"--edit {text} is no JSON object.")
    return edit


def _values(text: str) -> list[float]:
    """Raises click.UsageError."""
    found: list[float] = []
    for one in text.split(","):
        try:
            found.append(_number(float(one), "--sweep"))
        except ValueError:
            raise click.UsageError(
                f"--sweep {text} is not a list of numbers, as in -2,-1,0,0.5,1,2."
            ) from None
    return list(dict.fromkeys(found))


def _number(value: float, option: str) -> float:
    if not math.isfinite(value):
        raise click.UsageError(f"{option} {value:g} is no finite number.")
    return value


async def _asked(
    prompt: str,
    own: dict[str, Any] | None,
    edits: list[dict[str, Any]],
    presets: list[str],
    options: dict[str, Any],
) -> SideBySide | Sweep:
    """Raises click.ClickException, one sentence."""
    from neuroscope_vllm.cli.progress import counted
    from neuroscope_vllm.cli.steer_job import requests, side_by_side, sweep
    from neuroscope_vllm.cli.steer_server import Ask, connected
    from neuroscope_vllm.cli.supervise import console

    values = None if options["values"] is None else _values(options["values"])
    ask = Ask(
        prompt=prompt,
        system=options["system"],
        chat=not options["completion"],
        max_tokens=options["max_tokens"],
        temperature=options["temperature"],
        seed=options["seed"] if options["temperature"] > 0 else None,
    )
    async with connected(options["url"], options["features_url"], options["api_key"]) as server:
        if values is None or own is None:
            with console.status("answering"):
                edits = edits if own is None else [own, *edits]
                return await side_by_side(server, ask, edits, presets)
        with counted(requests(len(values)), "requests") as report:
            done = itertools.count(1)
            return await sweep(server, ask, own, values, edits, presets, lambda: report(next(done)))

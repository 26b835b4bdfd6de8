"""`neuroscope patch`: which activations of a prompt carry its answer."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neuroscope_vllm.cli.drawing import drawable, write
from neuroscope_vllm.cli.engines import sae_flags
from neuroscope_vllm.cli.failures import failures
from neuroscope_vllm.cli.options import check_device, device_flags

if TYPE_CHECKING:
    from neuroscope_vllm.core.patching.record import Patching

SAE_OPTIONS = ("sae", "layer", "sae_input", "config")
ALL = "all"
MAX_RANGE = 1_000_000

HELP = """Patch activations of a CLEAN prompt into a CORRUPTED one: what recovers the answer?

\b
  neuroscope patch "The capital of France is" "The capital of Italy is" \\
      --answer " Paris" --wrong " Rome" --output map.html

Both prompts are run. Then, for each layer and position, the corrupted one again, with its residual
there replaced by the clean run's, or with --kind features only the SAE's part of it, while what the
SAE does not explain stays. The metric is logit(answer) - logit(wrong) after the last token;
recovered is (patched - corrupted) / (clean - corrupted): 1 where a patch alone brings back the
clean answer, 0 where it does nothing. `all` patches all positions shown at once.

Before the first token that differs both runs are the same, so positions are shown from there on.
The prompts must have the same number of tokens, or be aligned with --align.

With --backend vllm the runs share, in its prefix cache, what comes before what is patched. It runs
in float32 and uncompiled; -- --dtype bfloat16, or -- --no-enforce-eager, to have it otherwise.

--json prints one object: the prompts with their tokens, answer and wrong, the metric of both
prompts, columns (position, and the source position that is put there, null if there is none), rows
(layer, features, metric and recovered by column, metric_of_all, recovered_of_all), and the model,
engine and SAEs they are of.
"""


@click.command("patch", help=HELP, epilog="Everything after -- goes to vLLM untouched.")
@click.argument("clean")
@click.argument("corrupted")
@click.argument("vllm_flags", nargs=-1, type=click.UNPROCESSED)
@click.option("--answer", required=True, help="What the clean prompt is answered with: one token.")
@click.option("--wrong", required=True, help="What the corrupted one is answered with: one token.")
@click.option("--model", help="Folder or hub id of the model, or demo (the default).")
@click.option("--chat", is_flag=True, help="Each prompt is a user's message to the model.")
@click.option(
    "--kind",
    type=click.Choice(["residual", "features"]),
    default="residual",
    show_default=True,
    help="What is patched: whole residuals, or features of an SAE.",
)
@click.option(
    "--layers",
    metavar="LIST",
    help="Layers to patch, as in 0,5,10-20 (all; with --kind features, those of the SAEs).",
)
@click.option(
    "--positions",
    metavar="LIST",
    help="Positions to patch, as in 1,4-6, or all (from the first token that differs).",
)
@sae_flags
@click.option("--features", metavar="LIST", help="Patch only these, as in 12,50-57.")
@click.option("--each", is_flag=True, help="Each of --features alone: a row a feature.")
@click.option(
    "--noising", is_flag=True, help="Put the corrupted run into the clean one: what destroys it?"
)
@click.option("--align", is_flag=True, help="Match the tokens of prompts of different lengths.")
@click.option(
    "--backend",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
    help="What runs the model; vllm is faster where prompts are long.",
)
@device_flags
@click.option(
    "--output",
    "outputs",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Write it as .json, .html, .png or .svg; may be given several times.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def command(outputs: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    with failures():
        files = [drawable(path) for path in outputs]
        record = _run(options)
    if record.metric_of_clean < record.metric_of_corrupted:
        click.echo(
            "Note: the corrupted prompt favours the answer more than the clean one does; are"
            " --answer and --wrong the right way round?",
            err=True,
        )
    if as_json:
        from neuroscope_vllm.core.json_text import to_json

        click.echo(to_json(record))
    else:
        from neuroscope_vllm.cli.patch_table import print_heat

        print_heat(record)
    for path in files:
        with failures():
            write(path, lambda form: _content(form, record))


def _run(options: dict[str, Any]) -> Patching:
    everywhere = options["positions"] == ALL
    lists: dict[str, Any] = {
        name: _numbers(options.pop(name), name) for name in ("layers", "positions", "features")
    }
    model, backend, vllm_flags = (options.pop(name) for name in ("model", "backend", "vllm_flags"))
    device, dtype = options.pop("device"), options.pop("dtype")
    check_device(backend, device, dtype)
    flags = {name: options.pop(name) for name in SAE_OPTIONS}
    if backend == "transformers" and vllm_flags:
        raise click.UsageError(f"{vllm_flags[0]} is for vLLM, not for transformers.")
    if options["kind"] == "residual":
        given = [name for name in SAE_OPTIONS if flags[name]]
        given += [name for name in ("features", "each") if {**options, **lists}[name]]
        if given == ["layer"]:
            raise click.UsageError("--layer is that of an SAE; name those to patch with --layers.")
        if given:
            flag = given[0].replace("_", "-")
            raise click.UsageError(f"--{flag} is for --kind features; give both, or leave it out.")
    if options["each"] and lists["features"] is None:
        raise click.UsageError("--each is for --features; name some.")
    if backend == "transformers":
        # Before torch is loaded: threads that spin while they wait for each other take several
        # times as long on a machine that others use too.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from neuroscope_vllm.cli.patch_job import EngineOptions, PatchOptions, run

    asked = PatchOptions(**options, **lists, everywhere=everywhere)
    engine = EngineOptions(backend, tuple(vllm_flags), device or "auto", dtype or "auto")
    return run(asked, model, engine, flags)


def _numbers(given: str | None, name: str) -> list[int] | None:
    """What a list such as 0,5,10-20 names, at least one; None of none, and of all."""
    if given is None or (given == ALL and name != "features"):
        return None
    found: set[int] = set()
    for part in given.split(","):
        ends = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if not 0 <= last - first < MAX_RANGE:
            raise click.UsageError(f"--{name} {given} is no list as in 0,5,10-20.")
        found.update(range(first, last + 1))
    return sorted(found)


def _content(suffix: str, record: Patching) -> bytes:
    from neuroscope_vllm.core.json_text import to_json
    from neuroscope_vllm.core.patching.page import heat_page

    if suffix == ".json":
        return f"{to_json(record)}\n".encode()
    if suffix == ".html":
        return heat_page(record).encode()
    from neuroscope_vllm.core.patching.picture import picture

    return picture(record, suffix[1:])

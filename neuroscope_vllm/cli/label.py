"""`neuroscope label`: what features mean, in a language model's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from neuroscope_vllm.cli.failures import in_a_sentence
from neuroscope_vllm.cli.llm_options import (
    DEFAULT_MODEL,
    KEYS_HELP,
    feature_list,
    llm_flags,
    open_examples,
)

MAX_LISTED = 10
_FILE = click.Path(dir_okay=False, path_type=Path)

HELP = f"""Label features from the examples that `neuroscope collect` gathered.

\b
label                                             {DEFAULT_MODEL} of OpenRouter
label --base-url http://127.0.0.1:8080/v1         the model that is served there
label --provider anthropic --model claude-haiku-4-5
label --labeller tokens --model FOLDER            no language model: tokens alone

For each feature a language model is shown its 10 strongest examples and 20 spread over the
strengths in which it fires, all of the half of the corpus that `score` does not use. Each label is
kept as it arrives, in a file of the LABELLER's own (by default named after the model), and the same
command goes on where an earlier one ended; what failed is asked again.
"""


@click.command("label", help=HELP, epilog=KEYS_HELP)
@click.option("--sae", help="SAE folder or hf:// address (the demo's).")
@click.option("--labeller", help="Name to keep the labels under; `tokens`: ask no language model.")
@click.option("--features", help="Only these, as in 1,2,3.")
@click.option("--limit", type=click.IntRange(1), help="So many features, at most.")
@click.option(
    "--min-examples",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    help="Features with fewer get no label.",
)
@click.option(
    "--traffic",
    type=_FILE,
    help="Stream recorded with Accept: application/x-ndjson; what it shows most comes first.",
)
@click.option("--relabel", is_flag=True, help="Also what has a label of this labeller already.")
@click.option("--prompt", type=_FILE, help="File in place of our prompt.")
@llm_flags
@click.option("--dry-run", is_flag=True, help="Say what it would take, and ask nothing.")
@click.option(
    "--batch-file",
    type=_FILE,
    help="Write the questions here, for `vllm run-batch` or a batch service; ask nothing.",
)
@click.option("--ingest", type=_FILE, help="Take the labels from what such a batch wrote.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def command(
    sae: str | None,
    features: str | None,
    dry_run: bool,
    batch_file: Path | None,
    ingest: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    from neuroscope_vllm.cli.label_job import TOKENS, Job
    from neuroscope_vllm.cli.labels import named_sae

    if sum((dry_run, batch_file is not None, ingest is not None)) > 1:
        raise click.UsageError("--dry-run, --batch-file and --ingest exclude each other.")
    with in_a_sentence():
        source = named_sae(sae)
        job = Job(source, open_examples(source), features=feature_list(features), **given)
        if job.labeller == TOKENS:
            if dry_run or batch_file or ingest:
                raise click.UsageError("--labeller tokens asks nobody; leave that option out.")
            found = job.label_by_tokens()
        elif dry_run:
            found = job.estimate()
        elif batch_file is not None:
            found = job.write_batch(batch_file)
        else:
            found = job.ingest(ingest) if ingest is not None else job.ask()
    _print(found, as_json)
    if found.get("failed") or found.get("stopped"):
        raise click.exceptions.Exit(1)


def _print(found: dict[str, Any], as_json: bool) -> None:
    from neuroscope_vllm.cli.label_tables import print_json

    if as_json:
        print_json(found)
        return
    few = found.get("too_few_examples", 0)
    left_out = f"{found['already_labelled']:,} labelled already"
    left_out += f", {few:,} with too few examples" if few else ""
    if "to_label" in found:
        price = "price unknown"
        if found["cost"] is not None:
            price = f"about ${found['cost']:.4f}, at most ${found['cost_at_most']:.4f}"
        click.echo(
            f"{found['to_label']:,} features to label; {left_out}\n"
            f"{found['model']}: about {found['prompt_tokens']:,} tokens in and "
            f"{found['answer_tokens']:,} out, {price}"
        )
    elif "questions" in found:
        click.echo(
            f"Wrote {found['questions']:,} questions to {found['file']}; {left_out}\n"
            f"Then: vllm run-batch -i {found['file']} -o RESULTS --model {found['model']}, and "
            f"neuroscope label --model {found['model']} --ingest RESULTS"
        )
    else:
        _print_labelled(found, left_out)


def _print_labelled(found: dict[str, Any], left_out: str) -> None:
    cost = f"; {found['cost']}" if "cost" in found else ""
    click.echo(f"{found['labelled']:,} features labelled in {found['file']}; {left_out}{cost}")
    if found.get("others"):
        click.echo(f"{found['others']:,} results were answers to other questions.")
    if found.get("without"):
        click.echo(f"{found['without']:,} features have no token that can be read.")
    failed = found.get("failed", {})
    for index, why in list(failed.items())[:MAX_LISTED]:
        click.echo(f"feature {index} failed: {why}", err=True)
    if failed:
        click.echo(
            f"{len(failed):,} features failed; the same command asks about those again.", err=True
        )
    if found.get("stopped"):
        click.echo(f"Stopped: {found['stopped']}", err=True)

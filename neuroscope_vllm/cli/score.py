"""`neuroscope score`: how well labels predict their features, by a language model's judgement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from neuroscope_vllm.cli.failures import in_a_sentence
from neuroscope_vllm.cli.llm_options import KEYS_HELP, feature_list, llm_flags


@click.command("score", epilog=KEYS_HELP)
@click.option("--sae", help="SAE folder or hf:// address (the demo's).")
@click.option("--labeller", required=True, help="Whose labels to score.")
@click.option("--features", help="Only these, as in 1,2,3.")
@click.option("--limit", type=click.IntRange(1), help="So many features, at most.")
@click.option(
    "--method",
    type=click.Choice(["detection", "fuzzing", "both"]),
    default="both",
    show_default=True,
    help="What the judge is asked.",
)
@click.option("--positives", default=20, show_default=True, type=click.IntRange(5, 100))
@click.option("--negatives", default=20, show_default=True, type=click.IntRange(5, 100))
@click.option(
    "--prompt",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to replace the prompt of one --method.",
)
@llm_flags
@click.option(
    "--rescore", is_flag=True, help="Also what is scored already, whose scores are forgotten first."
)
@click.option("--dry-run", is_flag=True, help="Say what it would take, and ask nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def command(
    sae: str | None,
    labeller: str,
    method: str,
    prompt: Path | None,
    features: str | None,
    llm_options: dict[str, Any],
    as_json: bool,
    **rest: Any,
) -> None:
    """Score a labeller's labels, on texts that no labeller has seen.

    For each feature a language model reads the label and some texts of the half of the corpus that
    `collect` kept from labellers: where the feature fires, spread over the strengths in which it
    does, and where it is silent, half of them with a neighbouring feature that fires. It says of
    each whether the feature fires in it (detection), and whether the marked tokens are those on
    which it does (fuzzing). A score is the mean of both classes' accuracies, 0.5 by chance; below
    0.6 a label is shown as unreliable wherever it is shown.

    Each score is kept as it is found, and the same command goes on where an earlier one ended.
    """
    from neuroscope_vllm.cli.labels import named_sae
    from neuroscope_vllm.cli.score_job import score

    kinds = ["detection", "fuzzing"] if method == "both" else [method]
    if prompt is not None and len(kinds) > 1:
        raise click.UsageError("--prompt is for one method; give --method as well.")
    with in_a_sentence("the same command again, without --rescore,"):
        found = score(
            named_sae(sae),
            labeller,
            kinds,
            prompt=prompt,
            features=feature_list(features),
            llm_options=llm_options,
            **rest,
        )
    _print(found, as_json)
    if found.get("failed") or found.get("stopped"):
        raise click.exceptions.Exit(1)


def _print(found: dict[str, Any], as_json: bool) -> None:
    from neuroscope_vllm.cli.label_tables import print_json

    if as_json:
        print_json(found)
        return
    few = len(found["too_few_texts"])
    if "to_score" in found:
        cost = "price unknown" if found["cost"] is None else f"about ${found['cost']:.4f}"
        click.echo(
            f"{found['to_score']:,} labels to score, {found['already_scored']:,} scored already, "
            f"{few:,} with too few texts\n{found['questions']:,} questions to {found['judge']}: "
            f"about {found['prompt_tokens']:,} tokens in and {found['answer_tokens']:,} out, {cost}"
        )
        return
    mean = "" if found["mean_score"] is None else f", mean {found['mean_score']:.3f}"
    click.echo(
        f"{found['scored']:,} labels scored{mean}, {found['unreliable']:,} of them unreliable; "
        f"{found['already_scored']:,} were scored already; {few:,} have too few texts"
    )
    for index, why in list(found["failed"].items())[:10]:
        click.echo(f"feature {index} failed: {why}", err=True)
    if found["failed"]:
        click.echo(
            f"{len(found['failed']):,} features failed; the same command, without --rescore, asks "
            f"what is missing.",
            err=True,
        )
    click.echo(f"Spent: {found['cost']}")
    if found["stopped"]:
        click.echo(f"Stopped: {found['stopped']}", err=True)

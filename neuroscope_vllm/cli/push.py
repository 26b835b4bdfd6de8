"""`neuroscope push`: publish calibrations and labels as a dataset on the Hugging Face hub."""

from __future__ import annotations

import click

from neuroscope_vllm.cli.failures import EPILOG, failures

HELP = """Publish what is known about SAEs to the dataset ORG/REPO, in one commit.

Writes the calibration and labels of each SAE, as `neuroscope calibrate` and `neuroscope labels
import` leave them, a manifest, and a card. What the dataset has about other SAEs, and by other
labellers, stays. `neuroscope pull --from ORG/REPO` brings it back. The dataset is made if it does
not exist.

Labels that were imported from Neuronpedia are never pushed: no licence is stated for them.
"""


@click.command("push", help=HELP, epilog=EPILOG)
@click.argument("repo", metavar="ORG/REPO")
@click.option("--sae", multiple=True, required=True, help="hf:// address of an SAE.")
@click.option("--labeller", multiple=True, help="Push only labels by this labeller.")
@click.option("--license", help="Licence of the dataset, such as cc-by-4.0; kept by later pushes.")
@click.option("--private", is_flag=True, help="Make a new dataset private; needs no --license.")
@click.option("--message", help="Commit message.")
def command(
    repo: str,
    sae: tuple[str, ...],
    labeller: tuple[str, ...],
    license: str | None,
    private: bool,
    message: str | None,
) -> None:
    from neuroscope_vllm.core.sharing.push import push

    with failures():
        url = push(repo, sae, labellers=labeller, license=license, private=private, message=message)
    click.echo(url)

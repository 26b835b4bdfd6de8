"""`neuroscope pull`: a model, its SAEs and what is known about them, each at one commit."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from neuroscope_vllm.cli.failures import EPILOG, failures

if TYPE_CHECKING:
    from neuroscope_vllm.core.sharing.pull import Pulled

HELP = """Fetch MODEL, SAEs, and calibrations and labels, and lock their commits.

Models and SAEs go to the Hugging Face cache, with your own token and settings (HF_TOKEN, HF_HOME,
HF_ENDPOINT, HF_HUB_OFFLINE). Calibrations and labels go where `neuroscope serve` finds them. The
lock file says which commit of each repository that was.

\b
  neuroscope pull google/gemma-2-2b-it --sae gemma-scope --layer 20
  neuroscope pull google/gemma-2-2b-it --from org/dataset     # the SAEs it is about, too
  neuroscope pull --locked                                    # exactly that, elsewhere
  neuroscope pull                                             # the same

A pull that names something writes the lock file anew, with the newest commits. It is refused where
that would drop a model, an SAE or a dataset from the file: name that too, or choose another --lock.

Run again, a pull that was stopped goes on with the files that are missing. Files of your own that
a pulled calibration or label file takes the place of are kept as *.old.
"""


@click.command("pull", help=HELP, epilog=EPILOG)
@click.argument("model", required=False)
@click.option("--sae", multiple=True, help="hf:// address of an SAE, or gemma-scope.")
@click.option("--layer", multiple=True, type=int, help="Layer, for gemma-scope.")
@click.option(
    "--from", "dataset", help="Dataset with calibrations and labels: ORG/REPO[@REVISION]."
)
@click.option("--revision", help="Branch, tag or commit of MODEL; an SAE's is in its address.")
@click.option(
    "--lock",
    "lock_file",
    type=click.Path(path_type=Path, dir_okay=False),
    default="neuroscope.lock",
    show_default=True,
    help="The lock file.",
)
@click.option("--locked", is_flag=True, help="Fetch what the lock file says, and nothing else.")
def command(
    model: str | None,
    sae: tuple[str, ...],
    layer: tuple[int, ...],
    dataset: str | None,
    revision: str | None,
    lock_file: Path,
    locked: bool,
) -> None:
    asked = bool(model or sae or dataset)
    if revision and not model:
        raise click.UsageError("--revision is MODEL's; name the model, or leave it out.")
    if not asked and not locked and not lock_file.exists():
        raise click.UsageError(
            f"nothing was named, and there is no {lock_file}; name a model and an SAE, such as "
            "google/gemma-2-2b-it --sae gemma-scope --layer 20. `neuroscope demo` needs no pull."
        )
    from neuroscope_vllm.core.sharing.lock import Lock, check_kept, load_lock
    from neuroscope_vllm.core.sharing.pull import check_request, fetch, resolve, sae_sources
    from neuroscope_vllm.core.sharing.repository import disk_errors

    with failures():
        sources = sae_sources(sae, layer, model)
        if locked or not asked:
            lock = load_lock(lock_file)
            check_request(lock, lock_file, model, revision, sources, dataset)
            pulled = fetch(lock, locked=True)
        else:
            earlier = load_lock(lock_file) if lock_file.exists() else Lock()
            resolved = resolve(model, revision, sources, dataset)
            check_kept(earlier, resolved, lock_file)
            pulled = fetch(resolved, locked=False)
            with disk_errors(lock_file):
                pulled.lock.save(lock_file)
    _report(pulled, lock_file)


def _report(pulled: Pulled, lock_file: Path) -> None:
    lock = pulled.lock
    words = ["neuroscope", "serve", lock.model.repo if lock.model else "MODEL"]
    if lock.model:
        click.echo(f"{lock.model.repo} {lock.model.commit[:12]}: {len(lock.model.files)} files")
    for sae, info in zip(lock.saes, pulled.saes, strict=True):
        layer = "of no recorded layer" if info.layer is None else f"layer {info.layer}"
        click.echo(f"{sae.name} {sae.commit[:12]}: {info.width} features, {layer}")
        words += ["--sae", sae.source]
    if lock.artefacts:
        count = len(lock.artefacts.sha256)
        click.echo(f"{lock.artefacts.repo} {lock.artefacts.commit[:12]}: {count} files")
    for path in pulled.installed:
        click.echo(f"  {path}")
    for path in pulled.kept:
        click.echo(f"  kept what was there: {path}")
    if lock.model:
        words += ["--", "--revision", lock.model.commit]
    click.echo(f"Locked in {lock_file}.")
    if lock.saes:
        what = "the model and SAEs" if lock.model else "the SAEs"
        click.echo(
            f"To serve {what} at these commits, with the calibrations and labels that are in place "
            f"then:\n  {shlex.join(words)}"
        )

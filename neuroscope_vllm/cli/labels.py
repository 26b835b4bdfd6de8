"""`neuroscope labels`: what an SAE's features mean, by labeller."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from neuroscope_vllm.core.labels import LabelSet

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
_one_labeller = click.option("--labeller", help="Only this labeller's labels.")


@click.group("labels")
def command() -> None:
    """Import, export, list, search and remove labels of an SAE's features.

    Labels are kept by labeller, side by side, in $NEUROSCOPE_DATA (~/.local/share/neuroscope), and
    are used by every server that is started after.
    """


def takes_sae(function: Callable[..., None]) -> Callable[..., None]:
    """Options that name an SAE, as `source`; None if none was given. Errors become sentences."""

    @click.option("--sae", help="SAE file, folder or hf:// address, or gemma-scope (the demo's).")
    @click.option("--model", help="Model of --sae gemma-scope, such as google/gemma-2-2b-it.")
    @click.option("--layer", type=int, help="Layer of --sae gemma-scope.")
    @functools.wraps(function)
    def wrapped(sae: str | None, model: str | None, layer: int | None, **rest: Any) -> None:
        from neuroscope_vllm.core.errors import NeuroscopeError

        try:
            function(source=_source(sae, model, layer), **rest)
        except NeuroscopeError as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            raise click.ClickException(
                f"{error.filename or 'a file'} can not be used: {error.strerror}."
            ) from None

    return wrapped


@command.command("import")
@click.argument("what", metavar="neuronpedia|FILE")
@click.argument("identifier", metavar="[MODEL/SOURCE]", required=False)
@click.option(
    "--from",
    "given",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Files, or a folder, of Neuronpedia's export, in place of fetching them.",
)
@click.option("--labeller", help="Whose labels those of FILE are to be (as it says).")
@takes_sae
def import_(
    source: str | None,
    what: str,
    identifier: str | None,
    given: tuple[Path, ...],
    labeller: str | None,
) -> None:
    """Take labels over, from Neuronpedia or from a JSONL or CSV file.

    \b
    labels import neuronpedia gemma-2-2b/20-gemmascope-res-16k
    labels import neuronpedia --sae gemma-scope --model google/gemma-2-2b-it --layer 20
    labels import mine.csv --labeller me --sae FOLDER

    Neuronpedia's labels are fetched from its public export, kept in $NEUROSCOPE_CACHE and cleaned;
    those of an earlier import are replaced. MODEL/SOURCE may be left out where the SAE records it.
    Of a FILE, each row has an index and a text, and may have labeller, score, method, model,
    created, examples and author, and what `score` adds; its labels are added to the labeller's, in
    place of those of the same features.
    """
    if what == "neuronpedia":
        if labeller is not None:
            raise click.UsageError("--labeller is for a FILE; Neuronpedia's are 'neuronpedia'.")
        _import_neuronpedia(source, identifier, given)
        return
    if identifier is not None or given:
        raise click.UsageError(f"MODEL/SOURCE and --from are for neuronpedia, not for {what}.")
    _import_file(_or_demo(source), Path(what), labeller)


@command.command("export")
@click.argument("labeller")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["jsonl", "csv"]),
    help="Default: as the file's name ends, else jsonl.",
)
@takes_sae
def export(source: str | None, labeller: str, output: Path | None, form: str | None) -> None:
    """Write a LABELLER's labels as JSONL or CSV, to a file or to stdout."""
    from neuroscope_vllm.core.labels import labels_of
    from neuroscope_vllm.core.labels.csv_file import to_csv

    _, labels = labels_of(_or_demo(source), labeller)
    is_csv = form == "csv" or (form is None and output is not None and output.suffix == ".csv")
    content = to_csv(labels).encode() if is_csv else labels.to_jsonl()
    if output is None:
        click.echo(content, nl=False)
    else:
        output.write_bytes(content)
        click.echo(f"Wrote {len(labels):,} labels to {output}", err=True)


@command.command("list")
@_json
@takes_sae
def list_(source: str | None, as_json: bool) -> None:
    """Labellers of an SAE, the one that events show first first."""
    from neuroscope_vllm.cli.label_tables import print_json, print_labellers

    source = _or_demo(source)
    stored = _stored(source)
    if as_json:
        print_json({"sae": source, "labellers": _summaries(stored)})
    else:
        print_labellers(_summaries(stored))


@command.command("search")
@click.argument("words", nargs=-1, required=True)
@_one_labeller
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(1), help="Of each labeller."
)
@_json
@takes_sae
def search(
    source: str | None, words: tuple[str, ...], labeller: str | None, limit: int, as_json: bool
) -> None:
    """Labels that hold all WORDS, or words that begin with them, or parts."""
    from neuroscope_vllm.cli.label_tables import print_json, print_labels

    query = " ".join(words)
    sets = _chosen(_or_demo(source), labeller)
    found = [label for labels in sets for label in labels.search(query, limit)]
    if as_json:
        print_json({"query": query, "labels": [label.to_dict() for label in found]})
    else:
        print_labels(found, f"no label holds {query!r}.")


@command.command("show")
@click.argument("indices", nargs=-1, required=True, type=click.IntRange(0), metavar="INDEX...")
@_one_labeller
@_json
@takes_sae
def show(source: str | None, indices: tuple[int, ...], labeller: str | None, as_json: bool) -> None:
    """Labels of features, by each labeller, and where they come from."""
    from neuroscope_vllm.cli.label_tables import print_json, print_labels

    sets = _chosen(_or_demo(source), labeller)
    found = [label for index in indices for one in sets if (label := one.get(index)) is not None]
    if as_json:
        print_json({"labels": [label.to_dict() for label in found]})
    else:
        print_labels(found, "none of these features has a label.")


@command.command("compare")
@click.argument("a")
@click.argument("b")
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(0), help="Features to list."
)
@click.option("--seed", default=0, help="Of the shuffling that wording is compared with (0).")
@_json
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page here instead."
)
@takes_sae
def compare(
    source: str | None, a: str, b: str, limit: int, seed: int, as_json: bool, html: Path | None
) -> None:
    """Labellers A and B side by side: coverage, wording, scores, and where they differ most."""
    from neuroscope_vllm.cli.label_compare import comparison_page, print_comparison
    from neuroscope_vllm.cli.label_tables import print_json
    from neuroscope_vllm.core.labels import labels_of
    from neuroscope_vllm.core.labels.compare import compare

    if as_json and html is not None:
        raise click.UsageError("--json and --html exclude each other.")
    source = _or_demo(source)
    found = compare(labels_of(source, a)[1], labels_of(source, b)[1], limit, seed)
    if html is not None:
        html.write_text(comparison_page(found, source), encoding="utf-8")
        click.echo(f"Wrote {html}", err=True)
    elif as_json:
        from msgspec import to_builtins

        print_json({"sae": source, **to_builtins(found)})
    else:
        print_comparison(found)


@command.command("remove")
@click.argument("labeller")
@click.option("--yes", is_flag=True, help="Do not ask.")
@takes_sae
def remove(source: str | None, labeller: str, yes: bool) -> None:
    """Delete a LABELLER's labels, also where their file is damaged."""
    from neuroscope_vllm.core import artefacts
    from neuroscope_vllm.core.errors import ConfigError
    from neuroscope_vllm.core.labels import labels_of, load_labels

    source = _or_demo(source)
    bearing = [path for path in artefacts.find_labels(source) if path.stem == labeller]
    path = bearing[0] if bearing else labels_of(source, labeller)[0]
    try:
        what = f"{len(load_labels(path)):,} labels of {labeller}"
    except ConfigError:
        what = f"the file of {labeller}, which holds no labels that can be read"
    if artefacts.home(source) not in path.parents:
        raise click.ClickException(
            f"the labels of {labeller} came with the SAE, in {path}; delete the file yourself."
        )
    if not yes:
        click.confirm(f"Delete {what} ({path})?", abort=True)
    path.unlink()
    if path == artefacts.labels_file(source, path.stem):
        artefacts.scores_file(source, path.stem).unlink(missing_ok=True)
    click.echo(f"Removed {what}.")


def _source(sae: str | None, model: str | None, layer: int | None) -> str | None:
    from neuroscope_vllm.core.sae.canonical import SUITE, canonical_source

    if sae == SUITE:
        if model is None or layer is None:
            raise click.UsageError(f"--sae {SUITE} needs --model and --layer.")
        return canonical_source(model, layer)
    if model is not None or layer is not None:
        raise click.UsageError(f"--model and --layer are for --sae {SUITE}.")
    if sae is not None and not sae.startswith("hf://") and not Path(sae).expanduser().exists():
        raise click.ClickException(f"SAE {sae} does not exist; give a path, or hf://org/repo/path.")
    return sae


def named_sae(sae: str | None) -> str:
    """The path or address of an SAE that is given by that alone; by default the demo's.

    Raises click.ClickException: There is none.
    """
    if sae == "gemma-scope":
        raise click.UsageError("name the SAE by its address; `neuroscope sae list MODEL` shows it.")
    return _or_demo(_source(sae, None, None))


def _or_demo(source: str | None) -> str:
    if source is not None:
        return source
    from neuroscope_vllm.cli.demo import demo_sae

    click.echo("No --sae was given: these are labels of the demo's SAE.", err=True)
    return str(demo_sae())


def _import_neuronpedia(
    source: str | None, identifier: str | None, given: tuple[Path, ...]
) -> None:
    from neuroscope_vllm.cli.label_tables import fetch_with_progress
    from neuroscope_vllm.core.labels import neuronpedia
    from neuroscope_vllm.core.sae.canonical import shown_source

    if identifier is not None:
        neuronpedia.check_identifier(identifier)
        if source is None and (source := shown_source(identifier)) is not None:
            click.echo(f"The SAE is {source}.", err=True)
    source = _or_demo(source)
    recorded, width = _shape(source)
    if identifier and recorded and identifier != recorded:
        raise click.ClickException(
            f"SAE {source} is {recorded} on Neuronpedia, not {identifier}; leave MODEL/SOURCE out, "
            f"or give the SAE that it is of."
        )
    identifier = identifier or recorded
    if identifier is None and not given:
        raise click.ClickException(
            f"SAE {source} records no source of Neuronpedia; give one as MODEL/SOURCE, such as "
            f"gemma-2-2b/20-gemmascope-res-16k."
        )
    files = neuronpedia.local_files(given) if given else fetch_with_progress(identifier or "")
    read = neuronpedia.read_explanations(files, identifier, width)
    if not read.labels:
        raise click.ClickException("the files hold no explanation that can be a label.")
    path = place(source, neuronpedia.LABELLER)
    read.labels.save(path)
    click.echo(
        f"Imported {len(read.labels):,} labels of {width:,} features into {path}\n"
        f"Left out: {read.leaked:,} texts with traces of the explainer's prompt or thoughts, "
        f"{read.empty:,} empty ones, {read.others:,} further explanations of the same features.\n"
        f"They are Neuronpedia's (https://www.neuronpedia.org/{identifier or ''}), without a "
        f"licence of their own: do not pass them on."
    )


def _import_file(source: str, file: Path, labeller: str | None) -> None:
    from neuroscope_vllm.core.labels import LabelSet, load_labels
    from neuroscope_vllm.core.labels.csv_file import read_csv

    read = read_csv if file.suffix.lower() == ".csv" else load_labels
    labels = read(file, labeller)
    width = _shape(source)[1]
    last = max(label.index for label in labels)
    if last >= width:
        raise click.ClickException(
            f"{file} has a label of feature {last}, but the SAE has {width:,} features; give the "
            f"SAE that they were made for."
        )
    path = place(source, labels.labeller)
    earlier = load_labels(path) if path.is_file() else LabelSet(labels.labeller)
    LabelSet(labels.labeller, [*earlier, *labels]).save(path)
    click.echo(f"Imported {len(labels):,} labels of {labels.labeller} into {path}")


def _shape(source: str) -> tuple[str | None, int]:
    """Where Neuronpedia shows an SAE, and its number of features; no download where the address
    tells."""
    from neuroscope_vllm.core.sae.canonical import features_of, neuronpedia_id

    if source.startswith("hf://") and (identifier := neuronpedia_id(source)) is not None:
        return identifier, features_of(identifier.rpartition("-")[2])
    from neuroscope_vllm.core.sae import read_sae_info

    info = read_sae_info(source)
    return info.neuronpedia_id, info.width


def _stored(source: str) -> dict[Path, LabelSet]:
    from neuroscope_vllm.core.labels import stored_labels

    return stored_labels(source)


def _chosen(source: str, labeller: str | None) -> list[LabelSet]:
    from neuroscope_vllm.core.labels import labels_of

    if labeller is not None:
        return [labels_of(source, labeller)[1]]
    return list(_stored(source).values())


def place(source: str, labeller: str) -> Path:
    """Where a labeller's labels go. Raises where another's name differs in case only."""
    from neuroscope_vllm.core import artefacts

    path = artefacts.labels_file(source, labeller)
    for other in artefacts.find_labels(source):
        if other.stem != labeller and other.stem.casefold() == labeller.casefold():
            raise click.ClickException(
                f"labeller {labeller} differs from {other.stem}, which has labels, in case only, "
                f"and many file systems take them for one; use another name, or remove those first."
            )
    return path


def _summaries(stored: dict[Path, LabelSet]) -> list[dict[str, Any]]:
    from msgspec.structs import asdict

    return [{**asdict(labels.summary()), "file": str(path)} for path, labels in stored.items()]

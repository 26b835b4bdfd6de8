"""`neuroscope sae`: what an SAE is, and which ones a model has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

if TYPE_CHECKING:
    from neuroscope_vllm.core.calibration import Calibration
    from neuroscope_vllm.core.sae import SAE

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


@click.group("sae")
def command() -> None:
    """Look at SAEs: their shape and weights, and which are known for a model."""


@command.command("show")
@click.argument("source")
@_json
def show(source: str, as_json: bool) -> None:
    """What the SAE at SOURCE is: a file, a folder or an hf:// address.

    Reads and checks its weights, and says whether a server can use it, and what its calibration
    and labels are.
    """
    from neuroscope_vllm.core.errors import NeuroscopeError
    from neuroscope_vllm.core.sae import load_sae

    try:
        described = _describe(source, load_sae(source))
    except NeuroscopeError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(msgspec.json.encode(described).decode())
    else:
        _print_table(described)


@command.command("list")
@click.argument("model")
@_json
def list_(model: str, as_json: bool) -> None:
    """The canonical SAE of each layer of MODEL, such as google/gemma-2-2b-it.

    They are what `--sae gemma-scope --layer N` means.
    """
    from neuroscope_vllm.core.errors import NeuroscopeError
    from neuroscope_vllm.core.sae.canonical import canonical_sources

    try:
        found = canonical_sources(model)
    except NeuroscopeError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(msgspec.json.encode({"model": model, "saes": found}).decode())
        return
    for layer, source in found.items():
        click.echo(f"{layer:3}  {source}")


def _describe(source: str, sae: SAE) -> dict[str, Any]:
    import torch

    from neuroscope_vllm.core.artefacts import find_calibration
    from neuroscope_vllm.core.calibration import Calibration
    from neuroscope_vllm.core.errors import SAEError
    from neuroscope_vllm.core.labels import stored_labels
    from neuroscope_vllm.core.sae.info import check_served

    try:
        check_served(sae.info)
        refused = None
    except SAEError as error:
        refused = str(error)
    threshold, norm = sae.threshold, torch.linalg.vector_norm(sae.W_dec, dim=1)
    calibration = find_calibration(source)
    return {
        **msgspec.structs.asdict(sae.info),
        "threshold": {
            "least": float(threshold.min()),
            "median": float(threshold.median()),
            "most": float(threshold.max()),
        },
        "decoder_norm": {"least": float(norm.min()), "most": float(norm.max())},
        "refused_by_servers": refused,
        "calibration": None
        if calibration is None
        else {"file": str(calibration), **_figures(Calibration.load(calibration))},
        "labels": [
            {"labeller": one.labeller, "labels": len(one), "file": str(path)}
            for path, one in stored_labels(source).items()
        ],
    }


def _figures(calibration: Calibration) -> dict[str, Any]:
    rebuilt = calibration.reconstruction
    return {
        "model": calibration.model,
        "corpus": calibration.corpus,
        "tokens": calibration.tokens,
        "l0": calibration.l0,
        "explained_variance": rebuilt.explained_variance if rebuilt else None,
        "sink_norm": calibration.sink_norm,
    }


def _print_table(described: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in described.items():
        if value is None or value == []:
            continue
        for part in value if isinstance(value, list) else [value]:
            table.add_row(name.replace("_", " "), _shown(part))
    Console().print(table)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (
            f"{name.replace('_', ' ')} {_shown(v)}"
            for name, v in value.items()
            if v not in ("", None)
        )
        return ", ".join(pairs)
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

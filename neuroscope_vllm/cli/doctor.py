"""`neuroscope doctor`: what is wrong here, and what to do about it."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

import click

from neuroscope_vllm.cli.options import (
    api_key_option,
    backend_flags,
    neuroscope_flags,
    settings_from,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from neuroscope_vllm.cli.doctor_check import Asked, Check

HELP = """Say what is wrong on this machine, and what to do about each thing.

Looks at versions, the plugin, the settings, whether MODEL (which is not loaded) and the SAEs fit,
labels and calibrations, ports, and the server that answers at --url, if one does. Give what you
give `neuroscope serve`; MODEL `demo` is the embedded one. Nothing is changed or started, and
nothing fetched but a config.json.

Exit code 0: all is well, or there are only warnings; 1: something fails; 2: it could not be looked
at.

--json prints one object: ok, counts (by verdict) and checks, each with section, name, verdict (ok,
warning, failure or not_applicable), seen, subject (what it is about, where there are several), and
the remedy of each warning and failure.
"""


@click.command("doctor", help=HELP)
@click.argument("model", required=False)
@backend_flags
@neuroscope_flags
@click.option("--url", help="URL of the feature stream (as set: http://127.0.0.1:8081).")
@click.option(
    "--chat-url", default="http://127.0.0.1:8080", show_default=True, help="URL of the OpenAI API."
)
@api_key_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
@click.pass_context
def command(
    context: click.Context,
    model: str | None,
    backend: str,
    device: str | None,
    dtype: str | None,
    url: str | None,
    chat_url: str,
    api_key: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    from neuroscope_vllm.cli.demo import NAME, demo_settings
    from neuroscope_vllm.cli.doctor_check import Asked
    from neuroscope_vllm.cli.engines import DEMO
    from neuroscope_vllm.cli.options import check_device
    from neuroscope_vllm.core.config import Settings, cache_dir
    from neuroscope_vllm.core.launch import url_host

    check_device(backend, device, dtype)
    settings, refused = None, None
    try:
        settings = demo_settings(flags) if model == DEMO else settings_from(flags)
    except click.UsageError:
        raise
    except click.ClickException as error:
        refused = error.message
    where = settings or Settings()
    own = f"http://{url_host(where.features_host)}:{where.features_port}"
    asked = Asked(
        model=str(cache_dir() / NAME) if model == DEMO else model,
        backend=backend,
        settings=settings,
        url=(url or own).rstrip("/"),
        chat_url=chat_url.rstrip("/"),
        api_key=api_key,
        expected=url is not None,
    )
    try:
        checks = _examine(asked, refused)
    except Exception:  # a fault of ours is not to read as one of this machine's
        click.echo(traceback.format_exc(), err=True)
        click.echo("Error: doctor itself failed; report the lines above.", err=True)
        context.exit(2)
    failed = any(check.verdict == "failure" for check in checks)
    if as_json:
        _print_json(checks)
    else:
        from neuroscope_vllm.cli.doctor_table import print_checks

        print_checks(checks)
    context.exit(1 if failed else 0)


def _examine(asked: Asked, refused: str | None) -> list[Check]:
    from neuroscope_vllm.cli.doctor_coverage import coverage_checks
    from neuroscope_vllm.cli.doctor_model import model_checks
    from neuroscope_vllm.cli.doctor_plugin import Probe, plugin_checks
    from neuroscope_vllm.cli.doctor_ports import port_checks
    from neuroscope_vllm.cli.doctor_server import look, server_checks
    from neuroscope_vllm.cli.doctor_settings import settings_checks
    from neuroscope_vllm.cli.doctor_versions import version_checks

    with Probe(asked.backend) as probe:
        versions = version_checks(asked)
        settings = settings_checks(asked, refused)
        model, known = model_checks(asked)
        coverage = coverage_checks(asked, known)
        running = look(asked.url, asked.api_key)
        ports = port_checks(asked, running.health is not None)
        server = server_checks(asked, running)
        plugin = plugin_checks(asked.backend, probe)
    return [*versions, *plugin, *settings, *model, *coverage, *ports, *server]


def _print_json(checks: Sequence[Check]) -> None:
    import msgspec

    verdicts = ("ok", "warning", "failure", "not_applicable")
    counts = {name: sum(check.verdict == name for check in checks) for name in verdicts}
    report = {"ok": not counts["failure"], "counts": counts, "checks": checks}
    click.echo(msgspec.json.encode(report).decode())

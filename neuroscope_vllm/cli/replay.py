"""`neuroscope replay`: recorded requests as if they ran now."""

from __future__ import annotations

import signal
import sys

import click

from neuroscope_vllm.core.errors import NeuroscopeError

HELP = """Tell the requests of a recording again: page, API and stream, without an engine.

DIR is the folder of `serve --record`, or a file that `export --parquet` wrote. All has the ids that
it had. Unless at once, it begins when somebody reads the stream or opens the page; pauses in which
nothing ran are cut to a second. Who reads a request with a stream secret must show it here, too.
What was told stays until Ctrl-C; a file that turns out to be damaged ends it with exit code 1.
"""


@click.command("replay", help=HELP)
@click.argument("recording", type=click.Path(exists=True), metavar="DIR")
@click.option("--request", "request_ids", multiple=True, help="Only this one, by any of its ids.")
@click.option(
    "--speed",
    type=click.FloatRange(min=0, max=1e6),
    default=1.0,
    show_default=True,
    help="How often faster than it was; 0: at once.",
)
@click.option(
    "--features-port", type=int, default=8081, show_default=True, help="Port of the stream."
)
def command(recording: str, request_ids: tuple[str, ...], speed: float, features_port: int) -> None:
    from neuroscope_vllm.core import launch
    from neuroscope_vllm.core.recording.files import Recording
    from neuroscope_vllm.server.__main__ import run
    from neuroscope_vllm.server.replay import create_replay, replay_config

    try:
        found = Recording(recording)
        places = found.choose(request_ids)
        config = replay_config(found, places, features_port)
        listener = launch.listen(config.settings.features_host, features_port)
    except NeuroscopeError as error:
        raise click.ClickException(str(error)) from None
    # Also where a shell started us ignoring it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run(config, listener, app=create_replay(config, found, places, speed))
    except KeyboardInterrupt:
        sys.exit(130)

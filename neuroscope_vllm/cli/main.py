"""The command group. Commands are imported when they are run, so `--help` is quick."""

from __future__ import annotations

import importlib

import click

COMMANDS = {
    "serve": "Serve a model with vLLM and stream its features beside it.",
    "demo": "Serve the embedded demo model; needs no GPU and no model hub.",
    "pull": "Fetch a model, SAEs, calibrations and labels, and lock their commits.",
    "push": "Publish calibrations and labels as a dataset on the Hugging Face hub.",
    "hub": "Run the side process alone, for engines that were started elsewhere.",
    "keys": "Make the key file of a hub that engines reach over TCP.",
    "watch": "Watch tokens and their features in the terminal, as they come.",
    "inspect": "Show the features of a text, from a running server or offline.",
    "labels": "Import, export, list, search and remove labels of features.",
    "label": "Ask a language model what features mean, from their examples.",
    "score": "Ask a language model how well labels predict their features.",
    "bench": "Measure what watching costs.",
    "sae": "Look at SAEs: their shape and weights, and which a model has.",
    "calibrate": "Measure how often and how strongly each feature fires.",
    "collect": "Collect examples of every feature from a corpus.",
    "steer": "Show what steering does to an answer, and at which strength.",
    "export": "Write a request's features to a file: a page, JSON lines or parquet.",
    "replay": "Tell recorded requests again, without an engine.",
    "rules": "Hold rules that steer, stop or tag against recorded traces.",
    "trace": "Trace what features of one layer do to those of a later one.",
    "patch": "Patch activations of one prompt into another: what recovers the answer?",
    "doctor": "Say what is wrong on this machine, and what to do about it.",
    "verify": "Check a running server against an offline recomputation.",
}


class LazyGroup(click.Group):
    """Reads names and one-line helps from COMMANDS; imports a command only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"neuroscope_vllm.cli.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="neuroscope-vllm", prog_name="neuroscope")
def main() -> None:
    """Watch a language model think while vLLM serves it.

    Live sparse-autoencoder features of every token of every request, labelled, on :8081, while
    vLLM's own OpenAI server keeps :8080.
    """

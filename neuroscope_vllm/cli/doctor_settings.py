"""`neuroscope doctor`: do the settings resolve, and can the files that they name be used?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from neuroscope_vllm.cli.doctor_check import Asked, Check, Section, cut
from neuroscope_vllm.core.config import CONFIG_FILE_VARIABLE, ENV_PREFIX, Settings, settings_dict
from neuroscope_vllm.core.errors import NeuroscopeError
from neuroscope_vllm.core.guide import check_presets, load_guide

if TYPE_CHECKING:
    from neuroscope_vllm.core.steering.catalogue import Operator

CHECKS = ("settings", "hub_keys", "steering", "guide", "label_files", "record")


def settings_checks(asked: Asked, refused: str | None) -> list[Check]:
    """`refused`: why the settings could not be resolved; None: they were."""
    section = Section("configuration", *CHECKS)
    if asked.settings is None:
        section.fail(
            "settings",
            refused or "",
            f"Correct it where it was given: a flag, a variable {ENV_PREFIX}…, or the YAML file of"
            f" --config or {CONFIG_FILE_VARIABLE}.",
        )
        return section.done("the settings can not be read")
    settings = asked.settings
    given = ", ".join(f"{name} {_shown(value)}" for name, value in settings_dict(settings).items())
    if settings.configured:
        section.ok("settings", given)
    else:
        section.skip("settings", "no SAE is given, so vLLM would run as if we were not there")
    _hub_keys(section, settings)
    operator = _steering(section, settings)
    _guide(section, settings, operator)
    _label_files(section, settings)
    _record(section, settings)
    return section.done()


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _hub_keys(section: Section, settings: Settings) -> None:
    from neuroscope_vllm.core.keys import load_keys

    if settings.hub_keys is None:
        section.skip("hub_keys", "no tcp:// hub is set, which alone has keys")
        return
    try:
        load_keys(Path(settings.hub_keys))
    except NeuroscopeError as error:
        section.fail("hub_keys", *cut(error, "Copy the file from the hub's host, with mode 600."))
    else:
        section.ok("hub_keys", f"{settings.hub_keys}, for its owner alone")


def _steering(section: Section, settings: Settings) -> Operator | None:
    """What the file holds, if it can be read."""
    if settings.steering is None:
        section.skip("steering", "no steering file is set")
        return None
    try:
        from neuroscope_vllm.core.steering.catalogue import Operator  # imports torch

        operator = Operator.load(settings.steering)
        for direction in operator.directions.values():
            direction.read()
    except NeuroscopeError as error:
        section.fail("steering", *cut(error, "Correct the file, or leave steering out."))
    except (ImportError, OSError) as error:
        section.skip("steering", f"torch can not be imported ({error})")
    else:
        counts = {
            "presets": operator.presets,
            "directions": operator.directions,
            "rules": operator.rules,
        }
        held = ", ".join(f"{len(values)} {name}" for name, values in counts.items())
        section.ok("steering", f"{settings.steering}: {held}")
        return operator
    return None


def _guide(section: Section, settings: Settings, operator: Operator | None) -> None:
    if settings.guide is None:
        section.skip("guide", "no guide is set")
        return
    try:
        suggestions = load_guide(settings)
        if operator is not None:
            check_presets(settings, operator.presets)
    except NeuroscopeError as error:
        section.fail("guide", *cut(error, "Correct the file, or leave guide out."))
    else:
        section.ok("guide", f"{settings.guide}: {len(suggestions)} suggestions")


def _label_files(section: Section, settings: Settings) -> None:
    from neuroscope_vllm.core.labels import load_labels

    if not settings.labels:
        section.skip("label_files", "none is given, so stored labels are used")
    for path in settings.labels:
        try:
            labels = load_labels(path)
        except NeuroscopeError as error:
            section.fail(
                "label_files", *cut(error, "Correct the file, or leave labels out."), subject=path
            )
        else:
            section.ok("label_files", f"{len(labels)} of {labels.labeller}", path)


def _record(section: Section, settings: Settings) -> None:
    """The folder is made when a server starts, and not here."""
    if settings.record is None:
        section.skip("record", "nothing is recorded")
        return
    folder = Path(settings.record).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        section.ok("record", str(folder))
    else:
        section.fail(
            "record",
            f"no file can be made in {folder}: {there} is no folder that you can write to.",
            "Name another folder with --record, or leave it out.",
        )

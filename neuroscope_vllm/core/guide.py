"""The guide: messages that the page suggests to who has not asked anything yet. Torch-free.

    suggestions:
      - title: A capital city
        prompt: What is the capital of France?
        look_for: Features of countries and cities, before the answer names one.
      - title: In good spirits
        prompt: How was your day?
        preset: cheerful
        max_tokens: 80

One with a preset, of the operator's steering file, is answered twice: with and without. The page
asks at temperature 0, for `max_tokens` where they are given and else as its options say.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import msgspec

from neuroscope_vllm.core.config import Settings, read_yaml
from neuroscope_vllm.core.errors import ConfigError

KEY = "suggestions"


class Suggestion(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A message, and what there is to see in its answer."""

    title: str
    prompt: str
    look_for: str = ""
    preset: str | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None


def load_guide(settings: Settings) -> list[Suggestion]:
    """Those of `settings.guide`; none without one. Raises ConfigError, one sentence."""
    if settings.guide is None:
        return []
    path = Path(settings.guide)
    read = read_yaml(path, (KEY,), "guide")
    try:
        found = msgspec.convert(read.get(KEY) or [], list[Suggestion])
    except msgspec.ValidationError as error:
        raise ConfigError(f"guide {path}: {error}.") from None
    for one in found:
        if not one.title.strip() or not one.prompt.strip():
            raise ConfigError(f"guide {path}: a suggestion has no title or prompt; give both.")
        if one.preset is not None and settings.steering is None:
            raise ConfigError(
                f"guide {path}: {one.title!r} names preset {one.preset!r}, but there is no steering"
                " file that could have it; give one (--steering)."
            )
    return [msgspec.structs.replace(one, prompt=one.prompt.strip()) for one in found]


def check_presets(settings: Settings, presets: Collection[str]) -> None:
    """Raise ConfigError if the guide names a preset that the steering file does not have."""
    for one in load_guide(settings):
        if one.preset is not None and one.preset not in presets:
            raise ConfigError(
                f"guide {settings.guide}: {one.title!r} names preset {one.preset!r}, which steering"
                f" file {settings.steering} does not have; it has {', '.join(presets) or 'none'}."
            )

"""Prompts: files that one can read, and replace by others. Torch-free.

What the model is told: its task.
---
What it is asked, with {names} of what is filled in.
"""

from __future__ import annotations

import hashlib
import re
from importlib import resources
from pathlib import Path

import msgspec

from neuroscope_vllm.core.errors import ConfigError


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt.

    Attributes:
        name: Of its file, without the ending.
        digest: Of its bytes: what `Label.method` and `Label.scoring` know it by.
        system, user: Its two parts.
    """

    name: str
    digest: str
    system: str
    user: str

    def fill(self, **values: str) -> str:
        """The user part with each {name} replaced; what is filled in is taken as it stands."""
        return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), self.user)


def read_prompt(name: str, fields: set[str], path: Path | None = None) -> Prompt:
    """A prompt of ours, or the one in a user's file.

    Args:
        name: Of ours: `label`, `detection` or `fuzzing`.
        fields: What its user part must ask to be filled in.
        path: In place of ours.

    Raises:
        ConfigError: It can not be read, or is no prompt with these fields.
    """
    folder = resources.files("neuroscope_vllm.core.autointerp") / "prompts"
    try:
        content = (path or folder / f"{name}.md").read_bytes()
        system, line, user = content.decode().partition("\n---\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt {path} can not be read ({error}); give a text file.") from error
    missing = sorted(field for field in fields if f"{{{field}}}" not in user)
    if not line or missing:
        what = f"has no {{{missing[0]}}} after it" if line else "has no line with --- alone"
        raise ConfigError(
            f"prompt {path} {what}; write what the model is told, a line ---, and what it is asked "
            f"with {', '.join(f'{{{field}}}' for field in sorted(fields))}."
        )
    digest = hashlib.sha256(content).hexdigest()[:12]
    stem = path.stem if path else name
    return Prompt(name=stem, digest=digest, system=system.strip(), user=user.strip())

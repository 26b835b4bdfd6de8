"""What a model writes with: its unembedding and its tokens, read from its folder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from neuroscope_vllm.core.errors import ConfigError

_HEAD, _EMBEDDING, _NORM = "lm_head.weight", "embed_tokens.weight", "model.norm.weight"


class Unembedding(NamedTuple):
    """The last step of a model.

    Attributes:
        weight: float [vocabulary, d_model], W_U by token.
        gain: float32 [d_model], the final norm's.
        tokenizer: From token to text.
    """

    weight: Tensor
    gain: Tensor
    tokenizer: Tokenizer


def read_unembedding(folder: Path) -> Unembedding:
    """From a folder in the Hugging Face format, with safetensors.

    Raises:
        ConfigError: It is none, or a part is missing or damaged.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text())
        found: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  # it is no mapping
                    for wanted in (_HEAD, _EMBEDDING, _NORM):
                        if name.endswith(wanted):
                            found[wanted] = file.get_tensor(name)
        weight = found[_HEAD] if _HEAD in found else found[_EMBEDDING]
        gain = found[_NORM].float()
    except KeyError as error:
        raise ConfigError(
            f"model {folder} has no weights named {error}, so what it writes can not be told from"
            " it; give another, or none."
        ) from error
    except Exception as error:  # tokenizers raises no class of its own
        raise ConfigError(
            f"model {folder} can not be read ({error}); give a folder with config.json, "
            f"tokenizer.json and safetensors."
        ) from error
    if str(config.get("model_type", "")).startswith("gemma"):
        gain = gain + 1.0  # Gemma stores its norms' gains less one
    return Unembedding(weight, gain, tokenizer)

"""What can be steered with: the SAEs served, and what the operator's file adds.

presets:
  calm: [{op: add, layer: 20, feature: 4521, value: 80}]
directions:
  refusal: {file: refusal.safetensors, tensor: direction, layer: 20}
rules:
  - {name: watch-4521, when: {feature: 4521, above: 10}, tag: noticed}
warn_dose: 1.0
max_dose: 4.0
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.config import read_yaml
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.sae.sae import SAE
from neuroscope_vllm.core.steering.arithmetic import gains
from neuroscope_vllm.core.steering.spec import Edit, Rule


class Direction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A vector [d_model] of a safetensors file; relative paths are beside the operator's file."""

    file: str
    layer: int
    tensor: str | None = None
    """Its name; None: the file's only one."""

    def read(self) -> torch.Tensor:
        """Raises ConfigError, one sentence."""
        try:
            tensors = load_file(self.file)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"direction file {self.file} can not be read ({error}); give a safetensors file."
            ) from None
        if self.tensor is None and len(tensors) != 1:
            raise ConfigError(
                f"direction file {self.file} holds {len(tensors)} tensors; name one of"
                f" {', '.join(sorted(tensors)[:8]) or 'none'} with tensor."
            )
        vector = tensors.get(self.tensor or next(iter(tensors)))
        if vector is None:
            raise ConfigError(
                f"direction file {self.file} holds no tensor {self.tensor}; it has"
                f" {', '.join(sorted(tensors)[:8])}."
            )
        if vector.dim() != 1 or not vector.is_floating_point() or not vector.isfinite().all():
            raise ConfigError(
                f"direction {self.tensor or self.file} is no vector of finite numbers; give a"
                " float tensor of one dimension."
            )
        return vector.float()


class Operator(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The operator's file.

    Attributes:
        presets: Edits by name, which requests may name.
        directions: Vectors that edits may name.
        rules: Of every request.
        warn_dose, max_dose: Change of a layer over its median residual norm past which a request
            is warned, or refused.
    """

    presets: dict[str, list[Edit]] = {}
    directions: dict[str, Direction] = {}
    rules: list[Rule] = []
    warn_dose: float = 1.0
    max_dose: float = 4.0

    @classmethod
    def load(cls, file: str | None) -> Operator:
        """Raises ConfigError, one sentence that names the field. None: the defaults."""
        if file is None:
            return cls()
        path = Path(file)
        known = [field.name for field in msgspec.structs.fields(cls)]
        try:
            read = msgspec.convert(read_yaml(path, known, "steering file"), cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"steering file {path}: {error}.") from None
        for name in ("warn_dose", "max_dose"):
            if not getattr(read, name) > 0:
                raise ConfigError(f"steering file {path}: {name} must be above 0.")
        beside = path.resolve().parent
        directions = {
            name: msgspec.structs.replace(one, file=str(beside / one.file))
            for name, one in read.directions.items()
        }
        return msgspec.structs.replace(read, directions=directions)


class Site(msgspec.Struct, frozen=True):
    """What is known of a layer's SAE.

    Attributes:
        source: As the user gave it.
        norm: float32 [width], of what a feature of activation 1 adds to a row: of W_dec's rows,
            times a row's usual scale where rows are normalised one by one.
        gain: float32 [width], see `arithmetic.gains`.
        maximum: float32 [width], calibrated; None without a calibration.
        median_norm: Of residuals; None without a calibration.
        gates: Whether f of one feature depends on that feature alone, which a top-k SAE's does not.
    """

    source: str
    norm: NDArray[np.float32]
    gain: NDArray[np.float32]
    maximum: NDArray[np.float32] | None
    median_norm: float | None
    gates: bool

    @classmethod
    def of(cls, sae: SAE, calibration: Calibration | None, sae_input: str = "raw") -> Site:
        norm = torch.linalg.vector_norm(sae.W_dec.float(), dim=1).cpu()
        if calibration is not None and (sae.info.input_norm is not None or sae_input == "rms"):
            norm *= calibration.median_norm / sae.d_model**0.5
        return cls(
            source=sae.info.source,
            norm=norm.numpy(),
            gain=gains(sae).numpy(),
            maximum=calibration.maximum.numpy() if calibration else None,
            median_norm=(calibration.median_norm or None) if calibration else None,
            gates=sae.info.k is None,
        )


class Catalogue(msgspec.Struct, frozen=True):
    """Attributes:
    sites: By layer.
    operator: Whose file it was.
    norms: Of the operator's directions, by name.
    staged: Whether layers may lie in different processes, which do not see each other's conditions.
    drafts: Whether tokens run that may be rejected, and meet conditions before they are.
    kv_store: What keeps keys and values by their tokens alone, so that what is computed under an
        edit would reach others; None: nothing does.
    """

    sites: dict[int, Site]
    operator: Operator = Operator()
    norms: dict[str, float] = {}
    staged: bool = False
    drafts: bool = False
    kv_store: str | None = None

    @classmethod
    def build(
        cls,
        sites: dict[int, Site],
        operator: Operator,
        *,
        d_model: int,
        staged: bool = False,
        drafts: bool = False,
        kv_store: str | None = None,
    ) -> Catalogue:
        """Raises ConfigError if a direction does not fit the model."""
        norms = {}
        for name, direction in operator.directions.items():
            vector = direction.read()
            if len(vector) != d_model:
                raise ConfigError(
                    f"direction {name} has {len(vector)} numbers but this model's residuals have"
                    f" {d_model}; give one that was made on this model."
                )
            if direction.layer not in sites:
                raise ConfigError(
                    f"direction {name} is of layer {direction.layer}, but the layers served are"
                    f" {', '.join(map(str, sorted(sites)))}; serve an SAE of that layer too."
                )
            norms[name] = float(torch.linalg.vector_norm(vector))
        return cls(sites, operator, norms, staged, drafts, kv_store)

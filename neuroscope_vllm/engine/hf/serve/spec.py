"""What the server's process is told. Torch-free."""

from __future__ import annotations

import msgspec

from neuroscope_vllm.core.config import Settings


class ServeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Settings are resolved; the rest is as `vllm serve` has it under the same names.

    Attributes:
        model: Folder or hub id.
        served_model_name: What clients call it; None: as `model`.
        max_model_len: Longest context; None: as long as the model was made for.
        allowed_origins: Of pages elsewhere that may read answers.
    """

    model: str
    settings: Settings
    host: str = "127.0.0.1"
    port: int = 8080
    device: str = "auto"
    dtype: str = "auto"
    served_model_name: str | None = None
    max_model_len: int | None = None
    allowed_origins: list[str] = []

    @property
    def name(self) -> str:
        return self.served_model_name or self.model

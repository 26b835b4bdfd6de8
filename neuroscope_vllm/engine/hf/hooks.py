"""Reading and replacing what a decoder layer of a transformers model returns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

Replace = Callable[[Tensor], Tensor | None]


@contextlib.contextmanager
def at_layer(layer: nn.Module, replace: Replace) -> Iterator[None]:
    """`replace` sees the hidden states [sequences, positions, d_model] that the layer returns.

    If it returns a tensor, that takes their place.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        new = replace(hidden)
        if new is None:
            return None
        return new if isinstance(output, Tensor) else (new, *output[1:])

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()

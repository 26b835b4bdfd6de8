"""The custom op that replaces rows of the residual stream inside the compiled graph.

Not a slot of the steer op: what it does not replace it need not read, a run may have a replacement
for each of its tokens, and what stands there afterwards is the given vector to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_library = torch.library.Library("neuroscope", "FRAGMENT")
_library.define(
    "replace(Tensor(a!) hidden, Tensor(b!) residual, Tensor chosen, Tensor values) -> ()"
)


def _replace(hidden: Tensor, residual: Tensor, chosen: Tensor, values: Tensor) -> None:
    """hidden + residual [n, d_model] of the chosen rows becomes `values`; others keep their bits.

    chosen: bool [max_rows]; values: [max_rows, d_model], the model's dtype.
    """
    here = chosen[: len(hidden)].unsqueeze(1)
    hidden.copy_(torch.where(here, values[: len(hidden)], hidden))
    residual.masked_fill_(here, 0.0)


_library.impl("replace", _replace, "CompositeExplicitAutograd")
torch.library.register_fake("neuroscope::replace", lambda *args: None)


class Replacements(nn.Module):
    """What the op reads: a row of the step is a row here. As large as what the hook keeps."""

    def __init__(self, layers: list[int], num_rows: int, d_model: int, dtype: torch.dtype) -> None:
        super().__init__()
        for layer in layers:
            values = torch.zeros(num_rows, d_model, dtype=dtype)
            self.register_buffer(f"values_{layer}", values, persistent=False)
            chosen = torch.zeros(num_rows, dtype=torch.bool)
            self.register_buffer(f"chosen_{layer}", chosen, persistent=False)
        self._layers = frozenset(layers)
        self._dirty: set[int] = set()  # layers that may have chosen rows

    def replace(self, layer: int, hidden: Tensor, residual: Tensor) -> None:
        """Inside the compiled graph. No-op at a layer of another stage."""
        if layer in self._layers:
            table = self.get_buffer
            torch.ops.neuroscope.replace(
                hidden, residual, table(f"chosen_{layer}"), table(f"values_{layer}")
            )

    def fill(self, layer: int, rows: list[int], residuals: Tensor) -> None:
        """For the next forward pass: float32 [n, d_model] to n rows; in stream order on CUDA."""
        chosen, values = self.get_buffer(f"chosen_{layer}"), self.get_buffer(f"values_{layer}")
        index = torch.tensor(rows, device=values.device)
        values.index_copy_(0, index, residuals.to(values))
        chosen[index] = True
        self._dirty.add(layer)

    def clear(self) -> None:
        """After a forward pass: dummy runs and padding must find nothing to do."""
        for layer in self._dirty:
            self.get_buffer(f"chosen_{layer}").fill_(False)
        self._dirty.clear()

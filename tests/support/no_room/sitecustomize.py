"""On PYTHONPATH of a server on transformers: prompts of 300 tokens and more find no memory."""

import sys

if "neuroscope_vllm.engine.hf.serve" in " ".join(sys.orig_argv):
    import torch
    from torch import nn

    def _no_room(module: nn.Module, args: object) -> None:
        if isinstance(module, nn.Embedding) and args[0].numel() >= 300:  # type: ignore[index]
            raise torch.OutOfMemoryError("no room for it (a test's)")

    nn.modules.module.register_module_forward_pre_hook(_no_room)

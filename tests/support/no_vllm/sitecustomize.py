"""On PYTHONPATH of a command: there is no vLLM to import."""

import sys

sys.modules["vllm"] = None  # type: ignore[assignment]

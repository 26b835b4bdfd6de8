"""The compiler half: never asked to compile under the interpreter."""

from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget


class InterpretedBackend(BaseBackend):
    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreted-cpu"

    def parse_options(self, options: dict[str, Any]) -> object:
        return options

    def add_stages(self, stages: dict[str, Any], options: object, language: Any) -> None:
        raise RuntimeError("the interpreted CPU backend can not compile; set TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        pass

    def get_module_map(self) -> dict[str, Any]:
        return {}

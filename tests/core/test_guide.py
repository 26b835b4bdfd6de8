"""The guide file, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuroscope_vllm.core.config import Settings
from neuroscope_vllm.core.errors import ConfigError
from neuroscope_vllm.core.guide import check_presets, load_guide


def test_no_guide_suggests_nothing(tmp_path: Path) -> None:
    assert load_guide(Settings()) == []
    for text in ("", "suggestions:\n# - title: x\n"):
        (tmp_path / "empty.yaml").write_text(text)
        assert load_guide(Settings(guide=str(tmp_path / "empty.yaml"))) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("suggestions: 3", "Expected `array`, got `int`"),
        ("suggestions: [{title: x}]", "missing required field `prompt`"),
        ("suggestions: [{title: x, prompt: y, ask: z}]", "unknown field `ask`"),
        ("suggestions: [{title: ' ', prompt: y}]", "no title or prompt; give both"),
        ("suggestions: [{title: x, prompt: y, preset: p}]", "no steering file that could have it"),
        ("suggestions: [{title: x, prompt: y, max_tokens: 0}]", "Expected `int` >= 1"),
        ("suggestion: []", "did you mean suggestions?"),
        ("suggestions: [{title: x, prompt: 2024-02-30}]", "is not valid YAML"),
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


def test_a_preset_that_the_steering_file_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "guide.yaml"
    path.write_text('suggestions: [{title: x, prompt: "y\\n", preset: calm}]')
    settings = Settings(guide=str(path), steering="steering.yaml")
    assert load_guide(settings)[0].prompt == "y"
    check_presets(settings, {"calm": []})
    with pytest.raises(ConfigError, match=r"'calm', which .* does not have; it has cheerful, sad"):
        check_presets(settings, ["cheerful", "sad"])


def test_a_guide_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"guide /.*none\.yaml can not be read"):
        load_guide(Settings(guide=str(tmp_path / "none.yaml")))

"""Ids as vLLM makes them."""

import pytest

from neuroscope_vllm.engine.vllm.scheduler import choice_of


@pytest.mark.parametrize(
    ("internal", "external", "choice"),
    [
        ("chatcmpl-a-0123abcd", "chatcmpl-a", 0),
        ("3_chatcmpl-a-0123abcd", "chatcmpl-a", 3),
        ("12_x-0123abcd", "x", 12),
        # A client may choose an id that looks like a choice of another.
        ("3_mine-0123abcd", "3_mine", 0),
        ("1_3_mine-0123abcd", "3_mine", 1),
    ],
)
def test_choice(internal: str, external: str, choice: int) -> None:
    assert choice_of(internal, external) == choice

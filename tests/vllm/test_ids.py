"""Ids as vLLM makes them."""

import pytest
from vllm import SamplingParams

from neuroscope_vllm.engine.vllm.ids import CHOICES, Identity, identify


@pytest.mark.parametrize(
    ("internal", "external", "n", "expected"),
    [
        ("chatcmpl-a-0123abcd", "chatcmpl-a", 1, Identity("chatcmpl-a", 0, False)),
        ("3_chatcmpl-a-0123abcd", "chatcmpl-a", 4, Identity("chatcmpl-a", 3, False)),
        ("12_x-0123abcd", "x", 20, Identity("x", 12, False)),
        # Without vLLM's record of what the client sent, the random suffix goes.
        ("x-0123abcd", None, 1, Identity("x", 0, False)),
        # A client may choose an id that looks like a choice of another, or like a prompt's.
        ("3_mine-0123abcd", "3_mine", 1, Identity("3_mine", 0, False)),
        ("1_3_mine-0123abcd", "3_mine", 2, Identity("3_mine", 1, False)),
        ("chatcmpl-a-1-0123abcd", "chatcmpl-a-1", 1, Identity("chatcmpl-a-1", 0, False)),
        # Prompts of /v1/completions: their choices are numbered through.
        ("cmpl-a-0-0123abcd", "cmpl-a-0", 1, Identity("cmpl-a", 0, False)),
        ("cmpl-a-2-0123abcd", "cmpl-a-2", 1, Identity("cmpl-a", 2, False)),
        ("1_cmpl-a-2-0123abcd", "cmpl-a-2", 3, Identity("cmpl-a", 7, False)),
        ("cmpl-a-7-0-0123abcd", "cmpl-a-7-0", 1, Identity("cmpl-a-7", 0, False)),
        # Beams.
        (
            "chatcmpl-a-0123456789abcdef-beam-2-0123abcd",
            "chatcmpl-a-0123456789abcdef-beam-2",
            1,
            Identity("chatcmpl-a", 2, True),
        ),
        (
            "chatcmpl-a-beam-2-0123abcd",
            "chatcmpl-a-beam-2",
            1,
            Identity("chatcmpl-a-beam-2", 0, False),
        ),
    ],
)
def test_identity(internal: str, external: str | None, n: int, expected: Identity) -> None:
    params = SamplingParams(max_tokens=1 if expected.beam else 5, detokenize=not expected.beam)
    params.extra_args = {CHOICES: {"n": n}} if n > 1 else None
    assert identify(internal, external, params) == expected


@pytest.mark.parametrize("noted", [3, {"n": 1.5}, {"n": "a"}, {"n": -1}, {"n": 2**62}, {}, []])
def test_only_what_admission_noted_counts(noted: object) -> None:
    params = SamplingParams()
    params.extra_args = {CHOICES: noted}
    assert identify("cmpl-a-2-0123abcd", "cmpl-a-2", params) == Identity("cmpl-a", 2, False)


def test_a_chat_with_the_id_of_a_beam_is_a_chat() -> None:
    name = "chatcmpl-a-0123456789abcdef-beam-2"
    assert identify(f"{name}-0123abcd", name, SamplingParams()) == Identity(name, 0, False)

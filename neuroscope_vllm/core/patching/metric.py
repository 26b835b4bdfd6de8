"""How much of the difference between two prompts a patch recovers. Torch-free.

The metric m is the logit difference logit(answer) - logit(wrong answer) after the last token, or,
what is the same, that of their log-probabilities. Of it, a patch recovers

    (m - corrupted) / (clean - corrupted)

0 where the run answers as on the corrupted prompt, 1 where it answers as on the clean one (Zhang &
Nanda, arXiv 2309.16042).
"""

from __future__ import annotations

from typing import NamedTuple

from neuroscope_vllm.core.errors import ConfigError

MIN_DIFFERENCE = 0.1
"""In logits. Of less, rounding is too large a part."""


class Ends(NamedTuple):
    """The metric of the two prompts as they are."""

    clean: float
    corrupted: float

    def recovered(self, metric: float) -> float:
        return (metric - self.corrupted) / (self.clean - self.corrupted)


def check_ends(ends: Ends, answer: str, wrong: str) -> None:
    """Raises ConfigError: the prompts hardly differ, so there is nothing to recover."""
    # `not >=` and not `<`: a broken model's NaN is no difference either.
    if not abs(ends.clean - ends.corrupted) >= MIN_DIFFERENCE:
        raise ConfigError(
            f"the logit difference of {answer!r} and {wrong!r} is {ends.clean:.3f} on the clean"
            f" prompt and {ends.corrupted:.3f} on the corrupted one, too close to tell what a patch"
            " recovers; choose prompts or answers that differ more."
        )

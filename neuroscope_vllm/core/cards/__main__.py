"""Answers `Wanted` lines on stdin with `Answer` lines on stdout, until stdin ends.

The side process has no torch; it starts this one when the first card is asked for.
"""

from __future__ import annotations

import logging
import os
import sys

import msgspec

from neuroscope_vllm.core.cards.reader import read_card
from neuroscope_vllm.core.cards.record import Answer, Wanted

logger = logging.getLogger(__name__)


def main() -> None:
    # Lines of ours alone go to stdout, whatever a library prints.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        try:
            answer = Answer(card=read_card(msgspec.json.decode(line, type=Wanted)))
        except Exception as error:
            # A fault of ours, or a damaged file: the log has the trace, and the next card may do.
            logger.exception("neuroscope: a feature card could not be read")
            answer = Answer(error=f"{type(error).__name__}: {error}")
        out.write(msgspec.json.encode(answer) + b"\n")
        out.flush()


if __name__ == "__main__":
    main()

"""An alarm on one feature, over all requests of a server.

    python examples/feature_alarm.py 6091 --above 15

Prints a line each time the feature is more active than that; replace `alarm` with what should
happen. The stream is resumed when the server is restarted. A feature that is not among the
server's top k of a token is not seen; a rule in the worker sees each one (README, Steer).
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

from neuroscope_vllm import Client
from neuroscope_vllm.core.events import DoneEvent, GapEvent, TokenEvent

CONTEXT = 60


def alarm(token: TokenEvent, activation: float, before: str) -> None:
    """What to do about it: write to a log, page somebody, `client.steer(token.request_id, …)`."""
    when = time.strftime("%H:%M:%S")
    where = f"{token.request_id}, choice {token.choice}, position {token.position}"
    print(f"{when} {activation:6.1f}  {before!r} → {token.token!r}  ({where})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("feature", type=int)
    parser.add_argument("--above", type=float, default=0.0)
    parser.add_argument("--layer", type=int, help="where several are observed")
    parser.add_argument("--count", type=int, help="end after so many alarms")
    parser.add_argument("--features-url", default="http://127.0.0.1:8081")
    given = parser.parse_args()

    said: defaultdict[str | None, str] = defaultdict(str)
    alarms = 0
    with Client(given.features_url) as client:
        # Of generated tokens; leave `include` out to watch prompts, too.
        for event in client.stream(layer=given.layer, include="token", patience=3600):
            if isinstance(event, TokenEvent):
                before = said[event.internal_id][-CONTEXT:]
                said[event.internal_id] = before + event.token
                for feature in event.top_features:
                    if feature.index == given.feature and feature.activation > given.above:
                        alarm(event, feature.activation, before)
                        alarms += 1
                        if alarms == given.count:
                            return
            elif isinstance(event, DoneEvent):
                said.pop(event.internal_id, None)
            elif isinstance(event, GapEvent):
                print(f"not seen: {event.count or 'some'} events ({event.reason})", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None

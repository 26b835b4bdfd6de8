"""A chat through OpenAI's client, with the features of each token.

    pip install openai
    python examples/chat_with_features.py "What is gravity?"

Nothing about the chat changes: `wrap` returns the same client, whose answers have `features`.
"""

from __future__ import annotations

import argparse

from openai import OpenAI

from neuroscope_vllm import Client
from neuroscope_vllm.client import features_of
from neuroscope_vllm.core.events import TokenEvent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("message", nargs="?", default="What is gravity?")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1", help="vLLM")
    parser.add_argument("--features-url", default="http://127.0.0.1:8081")
    parser.add_argument("--max-tokens", type=int, default=40)
    given = parser.parse_args()

    with Client(given.features_url) as client:
        openai = client.wrap(OpenAI(base_url=given.url, api_key="none"))
        chunks = openai.chat.completions.create(
            model=openai.models.list().data[0].id,
            messages=[{"role": "user", "content": given.message}],
            max_tokens=given.max_tokens,
            stream=True,
        )
        for chunk in chunks:
            for token in features_of(chunk) or []:
                print(line(token), flush=True)


def line(token: TokenEvent) -> str:
    shown = [f"{f.label or f.index} {f.activation:.1f}" for f in token.top_features[:2]]
    return f"{token.token!r:18} {'; '.join(shown)}"


if __name__ == "__main__":
    main()

"""Measure which question's features tell most of a story, for the guide of the demo.

Usage, beside a running `neuroscope demo`: `python stories.py --words 'cit(y|ies)|countr|capital' \
'What is the capital of France?' 'Where is Paris?'`

Of each question, the share of the answer's tokens that show a feature whose label has one of the
words, and these features.
"""

import argparse
import re
import time
from collections import Counter

import httpx
from openai import OpenAI

MAX_TOKENS = 80


def token_events(features: str, request_id: str) -> list[dict]:
    """Of the answer, once it has ended."""
    while True:
        found = httpx.get(f"{features}/v1/requests/{request_id}", timeout=10)
        if found.status_code == 200 and found.json()["choices"][0]["finished"]:
            events = found.json()["choices"][0]["events"]
            return [event for event in events if event["event"] == "token"]
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--features-url", default="http://127.0.0.1:8081")
    parser.add_argument("--words", required=True, help="regular expression")
    parser.add_argument("questions", nargs="+")
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    story = re.compile(args.words, re.IGNORECASE)
    for question in args.questions:
        done = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=MAX_TOKENS,
        )
        events = token_events(args.features_url, done.id)
        shown: Counter[str] = Counter()
        for event in events:
            for one in event["top_features"]:
                if one["label"] and story.search(one["label"]):
                    shown[f"{one['label']} [{one['index']}]"] += 1
        telling = sum(
            any(one["label"] and story.search(one["label"]) for one in event["top_features"])
            for event in events
        )
        print(f"{telling / len(events):.0%} of {len(events)} tokens: {question}")
        print(f"  {' '.join((done.choices[0].message.content or '').split())}")
        for name, count in shown.most_common(6):
            print(f"  {count:3} {name}")


if __name__ == "__main__":
    main()

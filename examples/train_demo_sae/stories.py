"""Measure which question's features tell most of a story, for the guide of the demo.

Usage, beside a running `neuroscope demo`: `python stories.py --words 'cit(y|ies)|countr|capital' \
'What is the capital of France?' 'Where is Paris?'`

Of each question, the share of the answer's tokens that show a feature whose label has one of the
words, and these features.
"""

import argparse
import re
from collections import Counter

from openai import OpenAI

from neuroscope_vllm import Client

MAX_TOKENS = 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--features-url", default="http://127.0.0.1:8081")
    parser.add_argument("--words", required=True, help="regular expression")
    parser.add_argument("questions", nargs="+")
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    features = Client(args.features_url)
    model = client.models.list().data[0].id
    story = re.compile(args.words, re.IGNORECASE)
    for question in args.questions:
        done = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=MAX_TOKENS,
        )
        tokens = features.trace(done.id).answer
        told = [
            [f"{f.label} [{f.index}]" for f in token.top_features if story.search(f.label or "")]
            for token in tokens
        ]
        shown = Counter(name for names in told for name in names)
        print(f"{sum(map(bool, told)) / max(len(told), 1):.0%} of {len(told)} tokens: {question}")
        print(f"  {' '.join((done.choices[0].message.content or '').split())}")
        for name, count in shown.most_common(6):
            print(f"  {count:3} {name}")


if __name__ == "__main__":
    main()

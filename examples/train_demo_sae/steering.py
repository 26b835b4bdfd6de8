"""Measure what a steering edit does to answers: how often it shows, and whether they stay fluent.

Usage, beside a running `neuroscope demo`:

    python steering.py --edits '[{"op": "add", "feature": 12, "value": 60}]' --words 'sea|ships?'

or with `--preset NAME`, of its steering file. An edit is chosen by one twenty of prompts and
reported on the other (`--prompts report`), which had no part in the choice.

An answer shows the effect where it has one of the words. Fluency is what the model itself, without
steering, thinks of the answer: its perplexity; and how many of its three-word runs are new.
"""

import argparse
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median

from openai import OpenAI

PROMPTS = {
    "choose": [
        "How was your day?",
        "What should I cook tonight?",
        "Tell me a short story.",
        "What do you think about music?",
        "How do I learn a new language?",
        "Describe a perfect weekend.",
        "What makes a good friend?",
        "Give me advice for a job interview.",
        "What is the best way to relax?",
        "Write a short letter to my grandmother.",
        "What should I read next?",
        "Explain how a bicycle works.",
        "Why is the sky blue?",
        "What can I do on a rainy afternoon?",
        "Tell me about your favourite place.",
        "How can I sleep better?",
        "What is a good present for a child?",
        "Describe the town where you grew up.",
        "What did people do for fun a hundred years ago?",
        "Say something nice about Mondays.",
    ],
    "report": [
        "What is your favourite season?",
        "How do I start a garden?",
        "Why do we dream?",
        "What should I pack for a trip?",
        "Tell me about your family.",
        "How does a refrigerator work?",
        "What can I do when I feel lonely?",
        "Write a short thank-you note to a teacher.",
        "What makes a good leader?",
        "Describe your morning.",
        "How do I make a new friend?",
        "What is a healthy breakfast?",
        "Why do leaves change colour in autumn?",
        "Tell me something about trains.",
        "How can I save money?",
        "What should I paint?",
        "Describe a walk through a park.",
        "What is it like to be old?",
        "How do I prepare for an exam?",
        "Say something nice about winter.",
    ],
}
MAX_TOKENS = 80


class Demo:
    """The running demo."""

    def __init__(self, url: str) -> None:
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none")
        self._model = self._client.models.list().data[0].id

    def answer(self, prompt: str, spec: dict | None) -> str:
        body = {"vllm_xargs": {"neuroscope": json.dumps(spec)}} if spec else {}
        done = self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=MAX_TOKENS,
            extra_body=body,
        )
        return done.choices[0].message.content or ""

    def perplexity(self, prompt: str, answer: str) -> float:
        """Of an answer, by the model as it is."""
        if not answer.strip():
            return math.inf  # so that an empty answer counts as a bad one
        asked = [{"role": "user", "content": prompt}]
        answered = [*asked, {"role": "assistant", "content": answer}]
        before = len(self._logprobs(asked, add_generation_prompt=True))
        goes_on = {"add_generation_prompt": False, "continue_final_message": True}
        own = self._logprobs(answered, **goes_on)[before:]
        return math.exp(-sum(own) / len(own))

    def _logprobs(self, messages: list[dict], **how: bool) -> list[float]:
        """Of the tokens of a prompt, but the first."""
        done = self._client.chat.completions.create(
            model=self._model, messages=messages, max_tokens=1,
            extra_body={"prompt_logprobs": 0, **how},
        )  # fmt: skip
        return [
            next(iter(one.values()))["logprob"] for one in done.model_extra["prompt_logprobs"][1:]
        ]


def distinct(text: str) -> float:
    """The share of runs of three words that are there for the first time."""
    words = text.split()
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(runs)) / len(runs) if runs else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--edits", type=json.loads, help="JSON, as a request has them")
    how.add_argument("--preset")
    parser.add_argument("--words", required=True, help="regular expression, of whole words")
    parser.add_argument("--prompts", choices=PROMPTS, default="choose")
    parser.add_argument("--show", action="store_true", help="print all answers")
    args = parser.parse_args()
    demo = Demo(args.url)
    spec = {"steer": args.edits} if args.edits else {"preset": args.preset}
    effect = re.compile(rf"\b(?:{args.words})\b", re.IGNORECASE)
    prompts = PROMPTS[args.prompts]
    for name, given in (("without", None), ("steered", spec)):
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(partial(demo.answer, spec=given), prompts))
            perplexities = list(pool.map(demo.perplexity, prompts, answers))
        shown = sum(bool(effect.search(answer)) for answer in answers)
        print(
            f"{name}: shows in {shown} of {len(answers)};"
            f" perplexity {median(perplexities):.2f} (median),"
            f" new runs of three words {median(map(distinct, answers)):.0%}"
        )
        if args.show:
            for prompt, answer in zip(prompts, answers, strict=True):
                print(f"  {prompt}\n    {' '.join(answer.split())}")


if __name__ == "__main__":
    main()

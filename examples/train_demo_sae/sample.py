"""Chats sampled from the model itself: the distribution the demo really shows.

Usage: `python sample.py --model FOLDER --out FOLDER`

Written in parts, so that an interrupted run goes on where it stopped. Half of the chats have a
second question.
"""

import argparse
import itertools
import json
import random
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SEED = 0
CHATS = 6_144
PART = 128  # chats a file
NEW_TOKENS = (224, 160)  # at most, of the first and the second answer
TOP_K = 50  # not top_p: on a CPU its sort over the vocabulary takes half of a step

PROMPTS = json.loads(Path(__file__).with_name("prompts.json").read_text("utf-8"))


def questions() -> list[tuple[str, str]]:
    """Every question and its topic, in a shuffled but fixed order."""
    pairs = [
        (ask.format(topic), topic)
        for asks, topics in PROMPTS["asks"]
        for ask in asks
        for topic in topics
    ]
    random.Random(SEED).shuffle(pairs)
    return pairs


def chats(engine, asked: list[str], seed: int) -> list[list[int]]:
    """Token ids of a chat on each question, sampled with `engine`, a vLLM `LLM`."""
    from vllm import SamplingParams

    rng = random.Random(seed)
    turns = [[{"role": "user", "content": question}] for question in asked]
    made: list[list[int]] = [[] for _ in asked]
    open_chats = list(range(len(asked)))
    for round_, tokens in enumerate(NEW_TOKENS):
        sampling = SamplingParams(temperature=0.8, top_k=TOP_K, max_tokens=tokens)
        done = engine.chat([turns[i] for i in open_chats], sampling, use_tqdm=False)
        following = []
        for i, chat in zip(open_chats, done, strict=True):
            answer = chat.outputs[0]
            made[i] = [*chat.prompt_token_ids, *answer.token_ids]
            if round_ == 0 and i % 2 and answer.finish_reason == "stop":
                turns[i] += [
                    {"role": "assistant", "content": answer.text},
                    {"role": "user", "content": rng.choice(PROMPTS["follow_ups"])},
                ]
                following.append(i)
        open_chats = following
    return made


def read(folder: Path) -> list[list[int]]:
    """The chats sampled so far, in order."""
    parts = (load_file(path) for path in sorted(folder.glob("chats-*.safetensors")))
    return [ids.tolist() for part in parts for ids in part["ids"].split(part["lengths"].tolist())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chats", type=int, default=CHATS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    asked = [question for question, _ in questions()[: args.chats]]
    parts = [asked[i : i + PART] for i in range(0, len(asked), PART)]
    paths = [args.out / f"chats-{i:03}.safetensors" for i in range(len(parts))]
    if all(path.exists() for path in paths):
        return
    from vllm import LLM

    engine = LLM(str(args.model), dtype="bfloat16", max_model_len=1024, max_num_seqs=128, seed=SEED)
    for i, (path, part) in enumerate(zip(paths, parts, strict=True)):
        if path.exists():
            continue
        start = time.monotonic()
        made = chats(engine, part, SEED + i)
        lengths = torch.tensor([len(ids) for ids in made])
        ids = torch.tensor(list(itertools.chain(*made)), dtype=torch.int32)
        save_file({"ids": ids, "lengths": lengths}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        rate = len(ids) / (time.monotonic() - start)
        print(f"{path.name}: {len(ids):,} tokens, {rate:,.0f} a second", flush=True)


if __name__ == "__main__":
    main()

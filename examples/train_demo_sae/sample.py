"""Chats sampled from the model itself: the distribution the demo really shows.

Usage: `python sample.py --model FOLDER --out chats.safetensors`
"""

import argparse
import itertools
import random
from pathlib import Path

import torch
from safetensors.torch import save_file

SEED = 0

ASKS = (
    "Tell me about {}.",
    "What is the most important thing to know about {}?",
    "Explain {} to a ten-year-old.",
    "Write a short story about {}.",
    "Write a poem about {}.",
    "Give me five tips about {}.",
    "What are the pros and cons of {}?",
    "Write an email to a friend about {}.",
    "How did {} begin?",
    "Write a funny dialogue about {}.",
    "I am worried about {}. What should I do?",
    "Ask me three quiz questions about {} and give the answers.",
    "Why do people care about {}?",
    "Describe {} in one paragraph.",
    "Compare {} with something similar.",
    "Write a news headline and a first paragraph about {}.",
)

TOPICS = Path(__file__).with_name("topics.txt").read_text().splitlines()


def prompts(n: int, seed: int) -> list[str]:
    """`n` different questions, in a shuffled but fixed order."""
    pairs = [ask.format(topic) for ask in ASKS for topic in TOPICS]
    random.Random(seed).shuffle(pairs)
    return pairs[:n]


def chats(model: Path, n: int, seed: int, new_tokens: int = 208) -> list[list[int]]:
    """Token ids of `n` chats of one question and one answer, sampled with vLLM in bf16."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(model),
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=64,
        enforce_eager=True,
        seed=seed,
    )
    sampling = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=new_tokens)
    turns = [[{"role": "user", "content": question}] for question in prompts(n, seed)]
    done = engine.chat(turns, sampling, use_tqdm=False)
    return [[*chat.prompt_token_ids, *chat.outputs[0].token_ids] for chat in done]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chats", type=int, default=256)
    args = parser.parse_args()
    made = chats(args.model, args.chats, SEED)
    lengths = torch.tensor([len(ids) for ids in made])
    print(f"{len(made)} chats, {int(lengths.sum()):,} tokens")
    save_file({"ids": torch.tensor(list(itertools.chain(*made))), "lengths": lengths}, args.out)


if __name__ == "__main__":
    main()

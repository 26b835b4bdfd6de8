"""Calibrate a saved SAE on collected residuals and label its features from their own tokens.

Usage: `python describe.py --sae FOLDER --layer 20 --acts FOLDER --tokens FOLDER --model FOLDER`

Writes `calibration.safetensors` and `labels/tokens.jsonl` beside the SAE.
"""

import argparse
import datetime
from pathlib import Path

import torch
from collect import Shard
from corpus import SEQ_LEN, learnable
from measure import sink_cut
from train import training_shards
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuroscope_vllm.core.calibration import Calibration
from neuroscope_vllm.core.labels import Label, LabelSet
from neuroscope_vllm.core.passes import CalibrationPass, Rows
from neuroscope_vllm.core.sae import SAE, load_sae
from neuroscope_vllm.core.token_labels import (
    LABELLER,
    METHOD,
    TopExamples,
    compose_label,
    promoted_tokens,
)

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
EXAMPLES = 20
TOKENS = 2_000_000
"""Read, evenly over the corpus."""


def gather(sae: SAE, layer: int, chosen: list[Shard], tokenizer) -> tuple[Calibration, TopExamples]:
    """One pass over residuals, special tokens and attention sinks left out.

    What `neuroscope calibrate` gathers, from residuals that are already here; and it can not leave
    out the system prompt, which is the same in every chat.
    """
    examples = TopExamples(sae.width, EXAMPLES)
    gatherer, cut = None, 0.0
    for number, shard in enumerate(chosen):
        residuals, wanted = shard.read(layer), learnable(shard.tokens, tokenizer)
        if gatherer is None:
            _, cut = sink_cut(residuals, wanted)
            gatherer = _pass(layer, cut).gather(layer, sae)
        place = torch.arange(wanted.numel()).view_as(wanted) + number * wanted.numel()
        rows = (place[wanted], shard.tokens[wanted].long(), residuals[wanted])
        for position, token, x in zip(*(column.split(4096) for column in rows), strict=True):
            gatherer.add(Rows(torch.zeros_like(position), position, token, x))
            kept = x.float().norm(dim=-1) <= cut
            examples.update(sae.encode(x[kept]), token[kept], position[kept])
        print(f"{number + 1} of {len(chosen)} shards", flush=True)
    assert gatherer is not None
    return CalibrationPass.read(gatherer.result()), examples


def _pass(layer: int, cut: float) -> CalibrationPass:
    return CalibrationPass(
        special_ids=[],  # the mask has left them out
        sink_norm={layer: cut},
        sae={layer: f"{MODEL_NAME} layer {layer}"},
        model=MODEL_NAME,
        corpus="examples/train_demo_sae",
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def label(sae: SAE, examples: TopExamples, model: Path, created: str) -> LabelSet:
    """The `tokens` labels of every feature that has an example."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    full = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    gain, unembedding = full.model.norm.weight.detach(), full.lm_head.weight.detach()
    promoted = promoted_tokens(sae.W_dec * gain, unembedding)
    labels = []
    for index in range(sae.width):
        top = [(tokenizer.decode([e.token_id]), e.activation) for e in examples.of(index)]
        text = compose_label(top, [tokenizer.decode([i]) for i in promoted[index]])
        if text:
            labels.append(
                Label(index=index, text=text, labeller=LABELLER, method=METHOD, created=created)
            )
    return LabelSet(LABELLER, labels)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--sae", "--acts", "--tokens", "--model"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--layer", type=int, required=True)
    args = parser.parse_args()
    sae = load_sae(str(args.sae))
    found = training_shards(args.tokens, args.acts, args.layer)
    every = max(1, sum(len(one.tokens) for one in found) * SEQ_LEN // TOKENS)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration, examples = gather(sae, args.layer, found[::every], tokenizer)
    calibration.save(args.sae / "calibration.safetensors")
    labels = label(sae, examples, args.model, calibration.created)
    (args.sae / "labels").mkdir(exist_ok=True)
    labels.save(args.sae / "labels" / f"{LABELLER}.jsonl")
    print(f"{len(labels)} of {sae.width} features labelled, {calibration.tokens:,} tokens")
    print(f"median norm {calibration.median_norm:.1f}, sink cut {calibration.sink_norm:.1f}")


if __name__ == "__main__":
    main()

"""Calibrate a saved SAE on collected residuals and label its features from their own tokens.

Usage: `python describe.py --sae FOLDER --acts FOLDER --tokens tokens.safetensors --model FOLDER`

Writes `calibration.safetensors` and `labels/tokens.jsonl` beside the SAE.
"""

import argparse
import datetime
from pathlib import Path

import torch
from collect import LAYER, ROWS_PER_SHARD, stream
from corpus import learnable
from measure import sink_cut
from safetensors.torch import load_file

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


def gather(
    sae: SAE, acts: Path, tokens: torch.Tensor, mask: torch.Tensor
) -> tuple[Calibration, TopExamples]:
    """One pass over the collected residuals, special tokens and attention sinks left out.

    What `neuroscope calibrate` gathers, from residuals that are already here; and it can not leave
    out the system prompt, which is the same in every chat.
    """
    shards = zip(
        stream(acts, "train", len(tokens)),
        tokens.split(ROWS_PER_SHARD),
        mask.split(ROWS_PER_SHARD),
        strict=True,
    )
    examples = TopExamples(sae.width, EXAMPLES)
    gatherer, cut = None, 0.0
    for number, (residuals, ids, wanted) in enumerate(shards):
        if gatherer is None:
            _, cut = sink_cut(residuals, wanted)
            gatherer = _pass(cut).gather(LAYER, sae)
        place = torch.arange(ids.numel()).view_as(ids) + number * ROWS_PER_SHARD * ids.shape[1]
        rows = (place[wanted], ids[wanted].long(), residuals[wanted])
        for position, token, x in zip(*(column.split(4096) for column in rows), strict=True):
            gatherer.add(Rows(torch.zeros_like(position), position, token, x))
            kept = x.float().norm(dim=-1) <= cut
            examples.update(sae.encode(x[kept]), token[kept], position[kept])
        print(f"{number + 1} of {-(-len(tokens) // ROWS_PER_SHARD)} shards", flush=True)
    assert gatherer is not None
    return CalibrationPass.read(gatherer.result()), examples


def _pass(cut: float) -> CalibrationPass:
    return CalibrationPass(
        special_ids=[],  # the mask has left them out
        sink_norm={LAYER: cut},
        sae={LAYER: f"{MODEL_NAME} layer {LAYER}"},
        model=MODEL_NAME,
        corpus="examples/train_demo_sae",
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def label(sae: SAE, examples: TopExamples, model: Path, created: str) -> LabelSet:
    """The `tokens` labels of every feature that has an example."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokens = load_file(args.tokens)["train"]
    sae = load_sae(str(args.sae))
    mask = learnable(tokens, AutoTokenizer.from_pretrained(args.model))
    calibration, examples = gather(sae, args.acts, tokens, mask)
    calibration.save(args.sae / "calibration.safetensors")
    labels = label(sae, examples, args.model, calibration.created)
    (args.sae / "labels").mkdir(exist_ok=True)
    labels.save(args.sae / "labels" / f"{LABELLER}.jsonl")
    print(f"{len(labels)} of {sae.width} features labelled, {calibration.tokens:,} tokens")
    print(f"median norm {calibration.median_norm:.1f}, sink cut {calibration.sink_norm:.1f}")


if __name__ == "__main__":
    main()

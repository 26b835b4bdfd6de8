"""A Llama whose weights are set by hand, so that one circuit carries the answer.

Of "the capital of France today country is" layer 1 moves which country it is from that word to
"country", and layer 2 from there to "is", where the head reads it: Paris gains where it is France.
Other layers, and all words between, do nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.support.models import write_saelens_sae
from tests.support.saes import edit_tensors

CLEAN = "the capital of France today country is"
CORRUPTED = "the capital of Italy now country is"
COUNTRY, MIDDLE, LAST = 4, 6, 7
"""Positions, <bos> included; 5 differs too, and nobody reads it."""
LAYERS, D_MODEL = 4, 32
FEATURE = 6
"""Of the SAE after layer 1: which country it is, as "country" knows it."""
WORDS = [*CLEAN.split(), "Italy", "now", "Paris", "Rome"]

_EVERY, _BOS, _COUNTRY, _MIDDLE, _LAST, _FRANCE, _MOVED, _ANSWER = range(8)
_WORD = 8  # from here on, each word's own
_STRENGTH = 10.0
_SINK, _KEY = 15, 14  # of the head's dimensions: rotary pairs that hardly turn


def write_circuit(folder: Path) -> Path:
    tokens = ["<bos>", "<pad>", *(f"▁{word}" for word in WORDS)]
    tokenizer = Tokenizer(
        tokenizer_models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>", eos_token="<pad>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=D_MODEL, intermediate_size=8, num_hidden_layers=LAYERS,
        num_attention_heads=1, num_key_value_heads=1, head_dim=D_MODEL, bos_token_id=0,
        eos_token_id=1, pad_token_id=1, max_position_embeddings=512, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        model.model.embed_tokens.weight.copy_(_embeddings(tokens))
        _move(model.model.layers[1].self_attn, _COUNTRY, _MIDDLE, _FRANCE, _MOVED)
        _move(model.model.layers[2].self_attn, _MIDDLE, _LAST, _MOVED, _ANSWER)
        model.lm_head.weight[tokens.index("▁Paris"), _ANSWER] = 3.0
        model.lm_head.weight[tokens.index("▁Rome"), _EVERY] = 1.0
    model.save_pretrained(folder)
    return folder


def write_circuit_sae(folder: Path) -> Path:
    """Each feature is one dimension of the residual after layer 1."""
    write_saelens_sae(folder, d_model=D_MODEL, width=D_MODEL, layer=1)
    edit_tensors(
        folder / "sae_weights.safetensors",
        W_enc=torch.eye(D_MODEL),
        W_dec=torch.eye(D_MODEL),
        b_enc=torch.zeros(D_MODEL),
        b_dec=torch.zeros(D_MODEL),
        threshold=torch.full((D_MODEL,), 0.01),
    )
    return folder


def _embeddings(tokens: list[str]) -> torch.Tensor:
    found = torch.zeros(len(tokens), D_MODEL)
    found[:, _EVERY] = 1.0
    found[tokens.index("<bos>"), _BOS] = 1.0
    found[[tokens.index("▁France"), tokens.index("▁Italy")], _COUNTRY] = 1.0
    found[tokens.index("▁country"), _MIDDLE] = 1.0
    found[tokens.index("▁is"), _LAST] = 1.0
    found[tokens.index("▁France"), _FRANCE] = 1.0
    for number in range(len(tokens)):
        found[number, _WORD + number] = 0.5
    return found


def _move(attention: torch.nn.Module, key: int, reader: int, what: int, to: int) -> None:
    """Tokens marked `reader` look at the one marked `key`, and all others at <bos>, which has
    nothing; `what` that one holds is written to `to`."""
    read, ask, answer, write = (
        getattr(attention, f"{name}_proj").weight for name in ("k", "q", "v", "o")
    )
    read[_SINK, _BOS] = ask[_SINK, _EVERY] = _STRENGTH
    read[_KEY, key] = _STRENGTH
    ask[_KEY, reader] = 10 * _STRENGTH
    answer[0, what] = 1.0
    write[to, 0] = 1.0

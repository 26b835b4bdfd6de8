"""Models of a real shape without their weights, so that anyone can time them: a configuration, a
small tokenizer, and a random SAE of the shape that is served with it. vLLM draws the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GEMMA_2_2B = "gemma-2-2b"
SHAPE_FLAGS = ("--load-format", "dummy", "--served-model-name", "shape", "--max-model-len", "2048")
"""What `vllm serve` needs to serve one."""

# google/gemma-2-2b-it's config.json, but for the ids of the little tokenizer.
SHAPES: dict[str, dict[str, Any]] = {
    GEMMA_2_2B: {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 9216,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "dtype": "bfloat16",
    }
}
SAE_PATHS = {GEMMA_2_2B: ("layer_20/width_16k/average_l0_71", 16384)}
"""Gemma Scope's own folder, from which the layer is read, and the width."""

SPECIAL = ["<pad>", "<eos>", "<bos>", "<turn>", "<end>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog while the rain falls on the plain.",
    "Paris is the capital of France, and Rome is the capital of Italy; both are old cities.",
    "What a lovely day! How are you feeling, my friend? I am happy and a little tired.",
]


def write_shape(folder: Path, shape: str) -> tuple[Path, Path]:
    """(model, SAE), written below `folder`."""
    model = folder / shape
    model.mkdir(parents=True)
    tokenizer = small_tokenizer()
    tokenizer.save(str(model / "tokenizer.json"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    (model / "tokenizer_config.json").write_text(json.dumps(about | special))
    ids = {f"{name}_id": tokenizer.token_to_id(token) for name, token in special.items()}
    (model / "config.json").write_text(json.dumps(SHAPES[shape] | ids))
    path, width = SAE_PATHS[shape]
    return model, write_random_sae(folder / path, SHAPES[shape]["hidden_size"], width)


def small_tokenizer() -> Tokenizer:
    """A byte-level BPE of 512 tokens or fewer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    return tokenizer


def write_random_sae(folder: Path, d_model: int, width: int) -> Path:
    """A random `params.npz` in Gemma Scope's layout; returns the folder that holds it."""
    import numpy as np

    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    w_dec = draw.standard_normal((width, d_model), np.float32)
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    np.savez(
        folder / "params.npz",
        W_enc=np.ascontiguousarray(w_dec.T),
        W_dec=w_dec,
        b_enc=np.zeros(width, np.float32),
        b_dec=np.zeros(d_model, np.float32),
        threshold=draw.random(width, np.float32) + 1.0,
    )
    return folder

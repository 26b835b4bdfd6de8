"""Small random models and SAEs in the real file layouts, built from configs on the fly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from neuroscope_vllm.core.calibration import (
    Calibration,
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog while the rain falls on the plain.",
    "Paris is the capital of France, and Rome is the capital of Italy; both are old cities.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))\n",
    "What a lovely day! How are you feeling, my friend? I am happy 😀 and a little tired.",
    "你好，世界。 مرحبا بالعالم. Привет, мир. 1234567890 + 42 = ?",
] * 4
TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 56,
    "patch_size": 14,
}


def write_tokenizer(folder: Path, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template; emoji and Chinese split over several tokens."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TRAINING_TEXT,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<pad>", "<eos>", "<bos>", "<turn>", "<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
    return fast


def write_tiny_model(
    folder: Path,
    family: str,
    *,
    d_model: int = 64,
    layers: int = 26,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """Float32, random, with a tokenizer.

    Args:
        family: "gemma2", "gemma3", "gemma3-multimodal", "llama" or "qwen2".
        settings: More of its configuration (of its text model's), or other values of it.
    """
    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": d_model,
        "intermediate_size": 2 * d_model,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        # Larger than the default 0.02, so that layers matter and tokens differ.
        "initializer_range": 0.08,
    }
    config = _config(family, {**shape, **special, **settings}, special)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def _config(family: str, settings: dict[str, Any], special: dict[str, Any]) -> PreTrainedConfig:
    if family == "qwen2":
        return Qwen2Config(**settings)
    if family == "gemma2":
        return Gemma2Config(**{"query_pre_attn_scalar": 32, "sliding_window": 512} | settings)
    if family in ("gemma3", "gemma3-multimodal"):
        text = Gemma3TextConfig(**{"query_pre_attn_scalar": 32} | settings)
        if family == "gemma3":
            return text
        # The ids of images must lie within the little vocabulary; texts of tests do without them.
        ids = {"boi_token_index": 470, "eoi_token_index": 471, "image_token_index": 472}
        return Gemma3Config(
            text_config=text, vision_config=TINY_VISION, mm_tokens_per_image=4, **ids, **special
        )
    return LlamaConfig(**settings)


def write_saelens_sae(
    folder: Path,
    *,
    d_model: int,
    width: int,
    layer: int,
    scale: float = 1.0,
    seed: int = 0,
    gain: float = 1.0,
) -> Path:
    """A random JumpReLU SAE as SAELens saves it; about a tenth of the features fire.

    `gain`: w_enc · d of every feature.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    w_dec = torch.nn.functional.normalize(torch.randn(width, d_model, generator=generator), dim=1)
    tensors = {
        "W_enc": gain * w_dec.T.contiguous(),
        "W_dec": w_dec,
        "b_enc": torch.randn(width, generator=generator) * 0.1 * scale,
        "b_dec": torch.randn(d_model, generator=generator) * 0.1 * scale,
        "threshold": torch.rand(width, generator=generator) * scale + scale,
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": "jumprelu",
        "d_in": d_model,
        "d_sae": width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post", "model_name": "tiny"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def write_calibration(path: Path, *, width: int, sink_norm: float) -> Path:
    """A calibration that knows of no feature, and calls residuals above `sink_norm` sinks."""
    calibration = Calibration.empty(width, sink_norm=sink_norm)
    calibration.tokens = 1000
    calibration.save(path)
    return path

"""A model whose features are known by construction: kinds of words, a place, and a language.

A Llama of two layers that change nothing but for the first one's attention, which is uniform, and
writes two things: how near the start a token is, and how French the text is up to it. An SAE reads
both, and the kinds of words from their embeddings.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.support.models import write_saelens_sae
from tests.support.saes import edit_tensors


def _words(text: str) -> list[str]:
    return text.split()


D_MODEL, NORM = 64, 10.0
NUMBERS = [str(n) for n in range(11, 41)]
EVEN = [n for n in NUMBERS if int(n) % 2 == 0]
COLOURS = _words("red green blue yellow purple orange pink brown grey black white")
ANIMALS = _words("dog cat horse cow sheep goat lion tiger wolf bear mouse")
NAMES = _words("Anna Peter Maria Thomas Julia David Sarah Martin Laura Paul")
FRENCH = _words(
    "le la les des une dans avec pour sur mais maison jour temps homme femme vie monde pays ville "
    "rue eau porte main enfant soir matin route ciel mer grand petit beau bon nous vous elle ils "
    "parle mange voit dort marche chante tient garde reste trouve"
)
NEUTRAL = _words("taxi radio hotel menu piano opera zebra kilo tango poncho")
ENGLISH = _words(
    "the a of and to in is was it for on with as at by from that this but not are his her they we "
    "house day time man woman life world land town street water door hand child evening morning "
    "road sky sea big small fine good speaks eats sees sleeps walks sings holds keeps stays finds"
)
KINDS = {
    "numbers": NUMBERS,
    "even numbers": EVEN,
    "colours": COLOURS,
    "animals": ANIMALS,
    "names of people": NAMES,
    "French words": FRENCH,
}
PLACE, LANGUAGE = "the first three words of a text", "any word of a text in French"
FEATURES = [*KINDS, PLACE, LANGUAGE]
"""What each feature means, by index; those behind are noise."""
WIDTH = 12
FIRST = 3
"""Words that PLACE means."""


def means(label: str, words: list[str]) -> list[bool]:
    """On which of a text's words the feature of that meaning fires, as one can tell from it."""
    if label == PLACE:
        return [words[0] == "<bos>" and 1 <= at <= FIRST for at in range(len(words))]
    if label == LANGUAGE:
        is_french = sum(word in FRENCH for word in words) >= 2
        return [is_french and word != "<bos>" for word in words]
    return [word in KINDS[label] for word in words]


def write_model(folder: Path) -> Path:
    """The model and its tokenizer, of whole words."""
    words = ["<bos>", "<pad>", *dict.fromkeys((*NUMBERS, *COLOURS, *ANIMALS, *NAMES, *FRENCH,
                                               *NEUTRAL, *ENGLISH))]  # fmt: skip
    vocabulary = {w if w.startswith("<") else f"▁{w}": i for i, w in enumerate(words)}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>", eos_token="<pad>"
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=D_MODEL, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, head_dim=D_MODEL, bos_token_id=0,
        eos_token_id=1, pad_token_id=1, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" in name and "norm" not in name:
                weight.zero_()
        model.model.embed_tokens.weight.copy_(_embeddings(words))
        attention = model.model.layers[0].self_attn
        # Norms are all the same, so what a layer reads are embeddings, times sqrt(d) / NORM.
        read = NORM / D_MODEL**0.5
        basis = _basis()
        attention.v_proj.weight[0] = basis[_BOS] * read / NORM * 8
        attention.v_proj.weight[1] = basis[list(KINDS).index("French words")] * read
        attention.o_proj.weight[:, 0] = basis[FEATURES.index(PLACE)]
        attention.o_proj.weight[:, 1] = basis[FEATURES.index(LANGUAGE)]
    model.save_pretrained(folder)
    return folder


def write_sae(folder: Path) -> Path:
    """Reads each feature's direction in layer 0."""
    write_saelens_sae(folder, d_model=D_MODEL, width=WIDTH, layer=0)
    directions = torch.cat([_basis()[: len(FEATURES)], _basis()[-(WIDTH - len(FEATURES)) :]])
    threshold = torch.full((WIDTH,), 1.0)
    threshold[FEATURES.index(PLACE)] = 8 / (FIRST + 1.5)  # 8 / (position + 1), from <bos>
    threshold[len(FEATURES) :] = 2.0
    edit_tensors(
        folder / "sae_weights.safetensors",
        W_enc=directions.T.contiguous(),
        W_dec=directions,
        b_enc=torch.zeros(WIDTH),
        b_dec=torch.zeros(D_MODEL),
        threshold=threshold,
    )
    return folder


def write_corpus(path: Path, documents: int = 360, words: int = 99) -> Path:
    """Texts, a sixth of them French; kinds of words are rare enough to be missing from most."""
    draw = np.random.default_rng(0)
    rare: list[tuple[list[str], float]] = [
        (NUMBERS, 0.008), (COLOURS, 0.005), (ANIMALS, 0.005), (NAMES, 0.005), (NEUTRAL, 0.08)
    ]  # fmt: skip
    with path.open("w") as file:
        for number in range(documents):
            usual = FRENCH if number % 6 == 0 else ENGLISH
            kinds = [*rare, (usual, 1 - sum(share for _, share in rare))]
            chosen = draw.choice(len(kinds), words, p=[share for _, share in kinds])
            text = " ".join(str(draw.choice(kinds[kind][0])) for kind in chosen)
            file.write(json.dumps({"text": text}) + "\n")
    return path


_BOS = len(FEATURES)


def _basis() -> torch.Tensor:
    """[D_MODEL, D_MODEL] orthonormal rows: the features' directions, that of <bos>, and noise."""
    draw = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=draw))[0]


def _embeddings(words: list[str]) -> torch.Tensor:
    """[words, D_MODEL], all of one norm."""
    draw, basis = torch.Generator().manual_seed(1), _basis()
    found = torch.zeros(len(words), D_MODEL)
    found[0] = NORM * basis[_BOS]
    for row, word in enumerate(words[1:], start=1):
        strength = {"French words": 3.0}
        inside = sum(
            (strength.get(kind, 2 + 2 * torch.rand(1, generator=draw)) * basis[i]
             for i, (kind, members) in enumerate(KINDS.items()) if word in members),
            torch.zeros(D_MODEL),
        )  # fmt: skip
        noise = torch.randn(D_MODEL - _BOS - 1, generator=draw) @ basis[_BOS + 1 :]
        left = NORM**2 - inside.square().sum()
        found[row] = inside + noise / noise.norm() * left.sqrt()
    return found

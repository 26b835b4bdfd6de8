"""Log-probabilities of tokens, in the shapes of OpenAI's API and vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

Decode = Callable[[int], str]


class Ranked(NamedTuple):
    """A token, and the most likely ones in its place, best first: (token id, log-probability)."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


def ranked(logits: Tensor, token_id: int, most: int) -> Ranked:
    """Of raw logits [vocabulary], float32; `most` tokens beside the one chosen."""
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs[token_id]
    top = logprobs.topk(most) if most else None
    return Ranked(
        token_id,
        float(own),
        int((logprobs > own).sum()) + 1,
        list(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else [],
    )


def in_chat(found: Sequence[Ranked], decode: Decode) -> dict[str, Any]:
    def shown(token_id: int, logprob: float) -> dict[str, Any]:
        text = decode(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}

    return {
        "content": [
            {
                **shown(one.token_id, one.logprob),
                "top_logprobs": [shown(*other) for other in one.top],
            }
            for one in found
        ]
    }


def in_completion(found: Sequence[Ranked], decode: Decode, offset: int) -> dict[str, Any]:
    """`offset`: characters of the text before these tokens."""
    tokens = [decode(one.token_id) for one in found]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "text_offset": offsets,
        "token_logprobs": [one.logprob for one in found],
        "tokens": tokens,
        "top_logprobs": [
            {decode(token_id): logprob for token_id, logprob in [*one.top, one[:2]]}
            for one in found
        ],
    }


def of_prompt(found: Sequence[Ranked], decode: Decode) -> list[dict[str, Any] | None]:
    """As vLLM's `prompt_logprobs`: the first token has none."""
    listed: list[dict[str, Any] | None] = [None]
    for one in found:
        ranks = {token_id: (logprob, at) for at, (token_id, logprob) in enumerate(one.top, 1)}
        ranks[one.token_id] = (one.logprob, one.rank)
        listed.append(
            {
                str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": decode(token_id)}
                for token_id, (logprob, rank) in ranks.items()
            }
        )
    return listed

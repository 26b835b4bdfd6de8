"""What `neuroscope steer` does: from what was asked for to the record."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import click

from neuroscope_vllm.cli.steer_record import (
    Activations,
    Asked,
    Key,
    Result,
    SideBySide,
    Strength,
    Sweep,
    edited,
    edited_keys,
    is_steered,
    result,
    watched,
)
from neuroscope_vllm.cli.steer_server import Answered, Ask, Server, ServerRefused
from neuroscope_vllm.core.steering.settled import MAX_RULES


async def side_by_side(
    server: Server, ask: Ask, edits: list[dict[str, Any]], presets: list[str]
) -> SideBySide:
    """Raises click.ClickException, one sentence, and ServerRefused.

    One answer after the other: beside each other they would share batches, whose rounding can turn
    a greedy answer too.
    """
    steered = await _steered(server, ask, edits, presets)
    keys = edited_keys(steered)
    unsteered = await _unsteered(server, ask, keys)
    base, *results = await _results(server, unsteered, [steered], keys)
    asked = Asked(model=server.model, ask=ask, steer=edits, preset=presets)
    return SideBySide(asked, base, results[0])


def requests(values: int) -> int:
    """Of a sweep: answers, the unsteered one among them, and the scoring of each."""
    return 2 * (values + 1)


async def sweep(
    server: Server,
    ask: Ask,
    swept: dict[str, Any],
    values: Sequence[float],
    edits: list[dict[str, Any]],
    presets: list[str],
    report: Callable[[], object],
) -> Sweep:
    """`swept` with each of the values, beside `edits`; values that the server refuses are told.

    Args:
        report: Called after each of its requests.

    Raises click.ClickException, one sentence; ServerRefused: The server refuses them all.
    """

    async def one(value: float) -> Answered | ServerRefused:
        try:
            return await _steered(server, ask, [{**swept, "value": value}, *edits], presets)
        except ServerRefused as refused:
            report()  # which nobody will score
            return refused
        finally:
            report()

    answers = await gathered(*(one(value) for value in values))
    taken = [answer for answer in answers if isinstance(answer, Answered)]
    if not taken:
        raise next(answer for answer in answers if isinstance(answer, ServerRefused))
    keys = list(dict.fromkeys(key for answer in taken for key in edited_keys(answer)))
    keys.sort(key=lambda key: key[1] != swept.get("feature"))  # whose strength it is comes first
    unsteered = await _unsteered(server, ask, keys)
    report()
    base, *results = await _results(server, unsteered, taken, keys, report)
    of = dict(zip(map(id, taken), results, strict=True))
    return Sweep(
        Asked(model=server.model, ask=ask, steer=[swept, *edits], preset=presets),
        base,
        [
            Strength(value, None, answer.message)
            if isinstance(answer, ServerRefused)
            else Strength(value, of[id(answer)], None)
            for value, answer in zip(values, answers, strict=True)
        ],
    )


async def gathered(*tasks: Any) -> list[Any]:
    """Their results. Raises the first error itself, once none of them runs any more."""
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(task) for task in tasks]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in running]


async def _steered(
    server: Server, ask: Ask, edits: list[dict[str, Any]], presets: list[str]
) -> Answered:
    answered = await server.answer(ask, {"steer": edits, "preset": presets})
    if not is_steered(answered):
        raise click.ClickException(
            "the server answered without steering; serve with a neuroscope that steers."
        )
    return answered


async def _unsteered(server: Server, ask: Ask, keys: list[Key]) -> Answered:
    """With rules that only tell how active the features are, where the server has room for them."""
    watch = [
        {"when": {"layer": layer, "feature": feature, "above": 0, "positions": "all"}, "tag": "-"}
        for layer, feature in keys[:MAX_RULES]
    ]
    try:
        return await server.answer(ask, {"rules": watch})
    except ServerRefused:
        return await server.answer(ask, {})


async def _results(
    server: Server,
    unsteered: Answered,
    steered: list[Answered],
    keys: list[Key],
    report: Callable[[], object] = lambda: None,
) -> list[Result]:
    """Of the unsteered answer and the others."""

    async def scored(answer: Answered) -> list[float]:
        found = await server.logprobs(answer)
        report()
        return found

    answers = [unsteered, *steered]
    logprobs = await gathered(*map(scored, answers))
    labels = dict(zip(keys, await gathered(*(server.label(*key) for key in keys)), strict=True))
    activations: list[Activations] = [
        watched(unsteered, server.special),
        *(edited(answer, server.special) for answer in steered),
    ]
    return [
        result(answer, unsteered, logprob, active, keys, labels)
        for answer, logprob, active in zip(answers, logprobs, activations, strict=True)
    ]

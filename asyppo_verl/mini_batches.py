"""Which rows a mini-critic's training call gets, and in which order: whole numbers only.

A training call needs as many rows as whole mini-batches have. Padding rows, which carry no response token, fill the gap;
no response is dropped or used twice, and critics may share padding rows. Which rows an optimizer step sees does not depend on
the number of ranks.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def incomplete_groups(sessions: Iterable[tuple[str, str]], responses_per_prompt: int) -> int:
    """How many groups have fewer sessions than asked for; ``sessions`` are (group id, session id), repeats allowed."""
    found: dict[str, set[str]] = {}
    for group, session in sessions:
        found.setdefault(group, set()).add(session)
    return sum(len(ids) < responses_per_prompt for ids in found.values())


def padding_needed(shard_sizes: Iterable[int], mini_batch: int) -> int:
    """Padding rows the batch must hold so that every shard can be filled up to whole mini-batches."""
    return max(-size % mini_batch for size in shard_sizes)


def spread(responses: Sequence[T], padding: Sequence[T]) -> list[T]:
    """A training call's rows in order: responses as they came, padding rows at even distances between them.

    Consecutive mini-batches then hold nearly the same number of responses, so that no optimizer step rests on a few.
    """
    rows, total = [], len(responses) + len(padding)
    next_padding = iter(padding)
    next_response = iter(responses)
    for position in range(total):
        is_padding = (position + 1) * len(padding) // total > position * len(padding) // total
        rows.append(next(next_padding if is_padding else next_response))
    return rows


def mini_batches(rows: Sequence[T], mini_batch: int, *, ranks: int = 1) -> list[list[T]]:
    """What verl trains on together: each rank has an equal run of the rows, and gives an equal run of that to every step."""
    share, part = len(rows) // ranks, mini_batch // ranks
    assert share * ranks == len(rows) and part * ranks == mini_batch and share % part == 0
    return [
        [row for rank in range(ranks) for row in rows[rank * share + start : rank * share + start + part]]
        for start in range(0, share, part)
    ]


def rank_major(parts: Sequence[Sequence[Sequence[T]]]) -> list[T]:
    """The order of rows that :func:`mini_batches` cuts into given ones; ``parts[i][r]`` is what rank r has of the i-th."""
    return [row for of_rank in zip(*parts, strict=True) for part in of_rank for row in part]

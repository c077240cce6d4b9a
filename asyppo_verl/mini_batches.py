"""The order of rows in a mini-critic's training call: whole numbers only.

A shard is cut into as many optimizer steps as every other critic makes, of sizes as even as can be; no response is dropped
or used twice. verl wants as many rows of every rank in every step: padding rows, without response tokens, fill the gaps.
The number of ranks does not change the responses of a step.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def incomplete_groups(sessions: Iterable[tuple[str, str]], responses_per_prompt: int) -> int:
    """Count the groups that have fewer sessions than asked for, but some.

    Args:
        sessions: (group id, session id), repeats allowed.
        responses_per_prompt: how many were asked for.
    """
    found: dict[str, set[str]] = {}
    for group, session in sessions:
        found.setdefault(group, set()).add(session)
    return sum(len(ids) < responses_per_prompt for ids in found.values())


def step_count(rows: int, mini_batch: int, shard_sizes: Iterable[int]) -> int:
    """Count the optimizer steps of every critic in one pass over its shard, so that none goes without a response.

    Args:
        rows: of the batch, a multiple of ``mini_batch``.
        mini_batch: rows in a step of verl's one critic, which makes ``rows / mini_batch`` steps.
        shard_sizes: responses of every critic; one without any makes no step.
    """
    return min([rows // mini_batch, *(size for size in shard_sizes if size)])


def cut(rows: Sequence[T], steps: int) -> list[Sequence[T]]:
    """Cut rows into ``steps`` runs, in their order, whose lengths differ by at most one."""
    bounds = [len(rows) * step // steps for step in range(steps + 1)]
    return [rows[start:end] for start, end in itertools.pairwise(bounds)]


def rows_per_rank(steps: Sequence[Sequence[T]], ranks: int, multiple: int = 1) -> int:
    """Count the rows that every rank needs in every step to take the longest one: a multiple of its micro-batch."""
    return -(-max(map(len, steps)) // (ranks * multiple)) * multiple


def mini_batches(rows: Sequence[T], mini_batch: int, *, ranks: int = 1) -> list[list[T]]:
    """Cut rows as verl does: each rank has an equal part of the rows, and gives an equal part of it to each step."""
    share, part = len(rows) // ranks, mini_batch // ranks
    assert share * ranks == len(rows) and part * ranks == mini_batch and share % part == 0
    return [
        [row for rank in range(ranks) for row in rows[rank * share + start : rank * share + start + part]]
        for start in range(0, share, part)
    ]


def rank_major(parts: Sequence[Sequence[Sequence[T]]]) -> list[T]:
    """Put rows in the order that :func:`mini_batches` cuts into given ones; ``parts[i][r]`` is what rank r has of the i-th."""
    return [row for of_rank in zip(*parts, strict=True) for part in of_rank for row in part]

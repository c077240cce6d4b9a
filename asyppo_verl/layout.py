"""Which rows a mini-critic's training call gets, and in which order: whole numbers only.

A training call needs as many rows as whole mini-batches have. Padding rows, which carry no response token, fill the gap;
no response is dropped or used twice, and critics may share padding rows.
"""

from collections.abc import Iterable, Sequence


def incomplete_groups(sessions: Iterable[tuple[str, str]], responses_per_prompt: int) -> int:
    """How many groups have fewer sessions than asked for; ``sessions`` are (group id, session id), repeats allowed."""
    found: dict[str, set[str]] = {}
    for group, session in sessions:
        found.setdefault(group, set()).add(session)
    return sum(len(ids) < responses_per_prompt for ids in found.values())


def padding_needed(shard_sizes: Iterable[int], mini_batch: int) -> int:
    """Padding rows the batch must hold so that every shard can be filled up to whole mini-batches."""
    return max(-size % mini_batch for size in shard_sizes)


def spread(responses: Sequence[int], padding: Sequence[int]) -> list[int]:
    """One rank's rows in training order: responses as they came, padding rows at even distances between them.

    Consecutive mini-batches then hold nearly the same number of responses, so that no optimizer step rests on a few.
    """
    rows, total = [], len(responses) + len(padding)
    next_padding = iter(padding)
    next_response = iter(responses)
    for position in range(total):
        is_padding = (position + 1) * len(padding) // total > position * len(padding) // total
        rows.append(next(next_padding if is_padding else next_response))
    return rows


def training_order(num_responses: int, rank_parts: Iterable[Sequence[int]]) -> list[int]:
    """Join the ranks' parts of a training call; indices from ``num_responses`` on are padding rows."""
    order: list[int] = []
    for part in map(sorted, rank_parts):
        order += spread([i for i in part if i < num_responses], [i for i in part if i >= num_responses])
    return order

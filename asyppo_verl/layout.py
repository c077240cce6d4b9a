"""Which rows a mini-critic's training call gets, and in which order: whole numbers only.

A training call needs as many rows as whole mini-batches have. Padding rows, which carry no response token, fill the gap;
no response is dropped or used twice, and critics may share padding rows.
"""

from collections.abc import Sequence


def padding_needed(shard_sizes: Sequence[int], mini_batch_sizes: Sequence[int]) -> int:
    """Padding rows the batch must hold so that every shard can be filled up to whole mini-batches."""
    return max(-size % mini_batch for size, mini_batch in zip(shard_sizes, mini_batch_sizes, strict=True))


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

"""Exact order statistics of vectors of any length, in memory that does not grow with them.

Shape suffix: N positions of one vector. Candidates are the positions that take part; ties go to the earliest.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import floor

import torch
from torch import Tensor

# Positions per pass: small enough to stay in cache and to keep the extra memory constant.
CHUNK = 1 << 18
# Bits that one pass of the radix selection fixes.
_DIGIT = 16


def chunks(*tensors_N: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same stretch of every vector, one stretch after the other: work on them needs no memory that grows with N."""
    return zip(*(tensor_N.split(CHUNK) for tensor_N in tensors_N), strict=True)


def count_of(fraction: float, total: int) -> int:
    """``floor(fraction * total)`` of the decimal number that was written: 0.29 of 100 is 29, where floats make 28."""
    return floor(Fraction(str(fraction)) * total)


def select(score_N: Tensor, is_candidate_N: Tensor, count: int, *, largest: bool) -> Tensor:
    """Mark exactly ``count`` candidates, those with the lowest scores, or with the highest if ``largest``.

    Args:
        score_N: any float dtype, no NaN among the candidates.
        is_candidate_N: bool.
        count: from 0 to the number of candidates.

    Returns:
        Bool, (N,).
    """
    selected_N = torch.zeros_like(is_candidate_N)
    if count == 0:
        return selected_N
    ((threshold, ties_left),) = _kth_ranks(score_N, is_candidate_N, [count], largest=largest)
    for score, is_candidate, selected in chunks(score_N, is_candidate_N, selected_N):
        rank = _rank(score, largest)
        is_tied = (rank == threshold) & is_candidate
        torch.logical_and(rank < threshold, is_candidate, out=selected)
        if ties_left:
            is_tied &= is_tied.cumsum(0) <= ties_left
            ties_left -= int(is_tied.count_nonzero())
            selected |= is_tied
    return selected_N


def kth_lowest(score_N: Tensor, is_candidate_N: Tensor, ks: Sequence[int]) -> Tensor:
    """The k-th lowest score among the candidates for every k in ``ks`` (from 1); shape (len(ks),)."""
    ranks = [rank for rank, _ in _kth_ranks(score_N, is_candidate_N, ks, largest=False)]
    dtype = torch.promote_types(score_N.dtype, torch.float32)
    return _flip(torch.tensor(ranks, dtype=_rank_dtype(score_N))).view(dtype)


def _kth_ranks(score_N: Tensor, is_candidate_N: Tensor, ks: Sequence[int], *, largest: bool) -> list[tuple[int, int]]:
    """For every k (from 1): the rank of the k-th candidate, and how many of that very rank are among the first k.

    Radix selection, 16 bits a pass, all k in the same passes: ``torch.kthvalue`` gives the same rank but copies 12 bytes
    a position, and ``torch.quantile`` refuses more than 2^24 elements.
    """
    top = torch.iinfo(_rank_dtype(score_N)).bits - _DIGIT
    found = [(0, k) for k in ks]  # the rank's digits so far, and k among the candidates that share them
    for shift in range(top, -1, -_DIGIT):
        # The top digit carries the sign, so it starts below zero.
        found = [(prefix << _DIGIT if shift < top else -(1 << (_DIGIT - 1)), k) for prefix, k in found]
        starts = {start for start, _ in found}
        below = _count(score_N, is_candidate_N, shift, starts, is_top=shift == top, largest=largest)
        for index, (start, k) in enumerate(found):
            step = int(torch.searchsorted(below[start], k))
            found[index] = start + step, k - (int(below[start][step - 1]) if step else 0)
    return found


def _count(
    score_N: Tensor, is_candidate_N: Tensor, shift: int, starts: set[int], *, is_top: bool, largest: bool
) -> dict[int, Tensor]:
    """For every start: how many candidates have ``start <= rank >> shift <= start + i``, for all i below 2^16."""
    outside = 1 << _DIGIT
    counts = {start: torch.zeros(outside + 1, dtype=torch.int64, device=score_N.device) for start in starts}
    for score, is_candidate in chunks(score_N, is_candidate_N):
        rank = _rank(score, largest) >> shift
        for start, count in counts.items():
            digit = rank - start
            # At the top all are inside, and where is quicker than indexing. Below, a difference too large for 32 bits wraps
            # around, but never to the inside.
            is_inside = is_candidate if is_top else is_candidate & (digit >> _DIGIT == 0)
            digit = torch.where(is_inside, digit, outside) if is_top else digit[is_inside]
            count += torch.bincount(digit, minlength=outside + 1)
    return {start: count[:outside].cumsum(0) for start, count in counts.items()}


def _rank_dtype(score_N: Tensor) -> torch.dtype:
    return torch.int64 if score_N.dtype == torch.float64 else torch.int32


def _rank(score_N: Tensor, largest: bool) -> Tensor:
    """Integers in the order of the scores (reversed if ``largest``); half precision is widened exactly."""
    # Adding 0 turns -0.0 into 0.0, which is the same number with other bits.
    bits_N = (score_N.float() if score_N.itemsize < 4 else score_N).add(0.0).view(_rank_dtype(score_N))
    rank_N = _flip(bits_N)
    return rank_N.bitwise_not_() if largest else rank_N


def _flip(bits_N: Tensor) -> Tensor:
    """IEEE bits to two's complement of the same order, and back: negative numbers have their magnitude inverted."""
    info = torch.iinfo(bits_N.dtype)
    return (bits_N >> (info.bits - 1)).bitwise_and_(info.max).bitwise_xor_(bits_N)

"""Exact order statistics of long vectors.

Shape suffix: N positions of one vector. Candidates are the positions that take part; ties go to the earliest.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import floor

import torch
from torch import Tensor

# Positions per pass: small enough to stay in cache and to keep the extra memory constant.
CHUNK = 1 << 18


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
    if count == 0:
        return torch.zeros_like(is_candidate_N)
    score_N = -score_N if largest else score_N
    last = kth_lowest(score_N, is_candidate_N, [count])
    selected_N = (score_N < last) & is_candidate_N
    tied_N = (score_N == last) & is_candidate_N
    selected_N[tied_N.nonzero()[: count - int(selected_N.count_nonzero()), 0]] = True
    return selected_N


def kth_lowest(score_N: Tensor, is_candidate_N: Tensor, ks: Sequence[int]) -> Tensor:
    """The k-th lowest score among the candidates for every k in ``ks`` (from 1); shape (len(ks),).

    By numpy: ``torch.kthvalue`` takes several times as long, and ``torch.quantile`` refuses more than 2^24 elements.
    """
    candidates = score_N.detach()[is_candidate_N].to(torch.promote_types(score_N.dtype, torch.float32)).cpu().numpy()
    ranks = [k - 1 for k in ks]
    candidates.partition(ranks)
    return torch.from_numpy(candidates[ranks]).to(score_N.device)

"""AsyPPO, the algorithm: which critic trains on which response, their mean and disagreement, and the two selections.

Source: Liu et al., "Asymmetric Proximal Policy Optimization: Mini-Critics Boost LLM Reasoning", arXiv 2510.01656.

Shape suffixes: M mini-critics, B responses, T response tokens, N tokens of a flattened (B, T). Every function that takes
a (B, T) tensor takes any other shape as well and reads it in row-major order.
"""

import zlib
from collections.abc import Iterator, Sequence
from math import floor

import torch
from torch import Tensor

# Tokens per pass of a selection: small enough to stay in cache and to keep the extra memory constant.
_CHUNK = 1 << 18
# Bits that one pass of the radix selection fixes.
_DIGIT = 16


def assign_shards(rows: Sequence[tuple[str, str]], *, num_critics: int, shard: str = "group") -> list[int]:
    """Deal every response to the one mini-critic that trains on it.

    ``shard="group"``: the sessions of a group, in the order of their ids, go to critics ``(rank + offset) mod M``. The
    offset is 0 when M divides the number of sessions, otherwise a hash of the group id, so that remainders favour no
    critic. ``shard="prompt"``: that hash gives the whole group to one critic. The rows of one session stay together.

    Args:
        rows: (group id, session id) of every row; rows may share a session.
        num_critics: M, at least 1.
        shard: "group" or "prompt".

    Returns:
        The critic of every row, a pure function of the ids inside the row's group.

    Raises:
        ValueError: if ``num_critics`` is below 1 or ``shard`` is unknown.
    """
    if num_critics < 1:
        raise ValueError(f"num_critics={num_critics} must be at least 1")
    if shard not in ("group", "prompt"):
        raise ValueError(f"shard={shard!r} must be 'group' or 'prompt'")
    sessions_of_group: dict[str, set[str]] = {}
    for group, session in rows:
        sessions_of_group.setdefault(group, set()).add(session)

    critic_of_session = {}
    for group, sessions in sessions_of_group.items():
        # Python's own hash() changes from process to process.
        offset = zlib.crc32(group.encode()) % num_critics
        if shard == "group" and len(sessions) % num_critics == 0:
            offset = 0
        # Shorter ids first puts the decimal numbers that verl uses in their natural order.
        for rank, session in enumerate(sorted(sessions, key=lambda session: (len(session), session))):
            critic_of_session[group, session] = (offset + (rank if shard == "group" else 0)) % num_critics
    return [critic_of_session[row] for row in rows]


def ensemble_value(values_MBT: Tensor) -> tuple[Tensor, Tensor]:
    """Average the mini-critics and measure how much they disagree.

    ``value = mean_m V_m`` and ``sigma = sqrt(mean_m (V_m - value)^2)``, the population standard deviation.

    The deviations are taken from the lowest critic and summed in sorted order: equal critics give exactly sigma = 0
    (M = 1 always does) and value = V_1, and the order of the critics changes no bit.

    Args:
        values_MBT: (M, B, T) values of any float dtype.

    Returns:
        value_BT, sigma_BT: both (B, T), float32.
    """
    value_BT = torch.empty(values_MBT.shape[1:], dtype=torch.float32, device=values_MBT.device)
    sigma_BT = torch.empty_like(value_BT)
    parts = zip(values_MBT.flatten(1).split(_CHUNK, dim=1), chunks(value_BT.view(-1), sigma_BT.view(-1)), strict=True)
    for values_MN, (value_N, sigma_N) in parts:
        values_MN = values_MN.to(torch.promote_types(values_MN.dtype, torch.float32))
        lowest_N = values_MN.amin(dim=0)
        above_MN = values_MN - lowest_N
        if len(above_MN) > 2:  # two terms add up to the same bits in either order
            above_MN = above_MN.sort(dim=0).values
        # Not Tensor.mean: with many critics it adds in an order that depends on where a token stands.
        mean_above_N = sum(above_MN.unbind()) / len(above_MN)
        value_N.copy_(lowest_N.add_(mean_above_N))
        squares_MN = above_MN.sub_(mean_above_N).square_()
        sigma_N.copy_(sum(squares_MN.unbind()).div_(len(squares_MN)).sqrt_())
    return value_BT, sigma_BT


def keep_advantage(sigma_BT: Tensor, is_response_BT: Tensor, *, fraction: float) -> Tensor:
    """Tokens whose advantage is used: all but the ``fraction`` of response tokens where the critics agree most.

    Exactly ``floor(fraction * number of response tokens)`` response tokens are False, those with the lowest sigma; ties
    go to the earliest token. If sigma is zero on every response token there is no signal to rank, and nothing is masked.

    Args:
        sigma_BT: (B, T) disagreement of the critics, any float dtype.
        is_response_BT: (B, T) True (or 1) on response tokens; everything else is True in the result.
        fraction: k of the paper, in [0, 1).

    Returns:
        keep_BT: (B, T) bool, True = used.

    Raises:
        ValueError: if ``fraction`` is outside [0, 1) or the shapes differ.
    """
    return ~_select(sigma_BT, is_response_BT, fraction=fraction, largest=False)


def keep_entropy(sigma_BT: Tensor, is_response_BT: Tensor, *, fraction: float) -> Tensor:
    """Tokens whose entropy earns the bonus: all but the ``fraction`` of response tokens where the critics disagree most.

    The same rules as :func:`keep_advantage`, from the other end: the highest sigma is left out. ``fraction`` is h of the
    paper. With fractions that add up to at most 1, a token is dropped by both functions only if its sigma is so common
    that the same value bounds both ends.
    """
    return ~_select(sigma_BT, is_response_BT, fraction=fraction, largest=True)


def mask_advantage(advantages_BT: Tensor, keep_BT: Tensor) -> Tensor:
    """``A_t = 0`` where the advantage is not used; the others keep their bits, so denominators do not change."""
    return torch.where(keep_BT, advantages_BT, 0)


def filter_entropy(entropy_N: Tensor, keep_N: Tensor) -> Tensor:
    """Leave tokens out of the entropy bonus: zero entropy and exactly zero gradient where ``keep_N`` is False."""
    return torch.where(keep_N, entropy_N, 0)


def select_kth(score_BT: Tensor, is_response_BT: Tensor, ks: Sequence[int]) -> Tensor:
    """The k-th lowest score among the response tokens for every k in ``ks`` (from 1), exact at any size; shape (len(ks),)."""
    score_N, is_response_N = score_BT.reshape(-1), is_response_BT.reshape(-1).bool()
    ranks = [rank for rank, _ in _kth_ranks(score_N, is_response_N, ks, largest=False)]
    dtype = torch.promote_types(score_BT.dtype, torch.float32)
    return _flip(torch.tensor(ranks, dtype=_rank_dtype(score_N))).view(dtype)


def _select(score_BT: Tensor, is_response_BT: Tensor, *, fraction: float, largest: bool) -> Tensor:
    """Mark exactly floor(fraction * response tokens) of the response tokens; ties go to the earliest."""
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction} must lie in [0, 1)")
    if score_BT.shape != is_response_BT.shape:
        raise ValueError(f"shapes differ: {tuple(score_BT.shape)} scores, {tuple(is_response_BT.shape)} response flags")
    score_N, is_response_N = score_BT.reshape(-1), is_response_BT.reshape(-1).bool()
    selected_N = torch.zeros_like(is_response_N)
    count = floor(fraction * int(is_response_N.count_nonzero()))
    has_signal = any(bool((score != 0).logical_and_(real).any()) for score, real in chunks(score_N, is_response_N))
    if count == 0 or not has_signal:
        return selected_N.view(score_BT.shape)

    ((threshold, ties_left),) = _kth_ranks(score_N, is_response_N, [count], largest=largest)
    for score, is_response, selected in chunks(score_N, is_response_N, selected_N):
        rank = _rank(score, largest)
        is_tied = (rank == threshold) & is_response
        torch.logical_and(rank < threshold, is_response, out=selected)
        if ties_left:
            is_tied &= is_tied.cumsum(0) <= ties_left
            ties_left -= int(is_tied.count_nonzero())
            selected |= is_tied
    return selected_N.view(score_BT.shape)


def _kth_ranks(score_N: Tensor, is_response_N: Tensor, ks: Sequence[int], *, largest: bool) -> list[tuple[int, int]]:
    """For every k (from 1): the rank of the k-th response token, and how many of that very rank are among the first k.

    Radix selection, 16 bits a pass, all k in the same passes: ``torch.kthvalue`` gives the same rank but copies 12 bytes
    a token, and ``torch.quantile`` refuses more than 2^24 elements.
    """
    top = torch.iinfo(_rank_dtype(score_N)).bits - _DIGIT
    found = [(0, k) for k in ks]  # the rank's digits so far, and k among the tokens that share them
    for shift in range(top, -1, -_DIGIT):
        # The top digit carries the sign, so it starts below zero.
        found = [(prefix << _DIGIT if shift < top else -(1 << (_DIGIT - 1)), k) for prefix, k in found]
        starts = {start for start, _ in found}
        below = _count(score_N, is_response_N, shift, starts, is_top=shift == top, largest=largest)
        for index, (start, k) in enumerate(found):
            step = int(torch.searchsorted(below[start], k))
            found[index] = start + step, k - (int(below[start][step - 1]) if step else 0)
    return found


def _count(
    score_N: Tensor, is_response_N: Tensor, shift: int, starts: set[int], *, is_top: bool, largest: bool
) -> dict[int, Tensor]:
    """For every start: how many response tokens have ``start <= rank >> shift <= start + i``, for all i below 2^16."""
    outside = 1 << _DIGIT
    counts = {start: torch.zeros(outside + 1, dtype=torch.int64, device=score_N.device) for start in starts}
    for score, is_response in chunks(score_N, is_response_N):
        rank = _rank(score, largest) >> shift
        for start, count in counts.items():
            digit = rank - start
            # At the top all are inside, and where is quicker than indexing. Below, a difference too large for 32 bits wraps
            # around, but never to the inside.
            is_inside = is_response if is_top else is_response & (digit >> _DIGIT == 0)
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


def chunks(*tensors_N: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same stretch of every vector, one stretch after the other: work on them needs no memory that grows with N."""
    return zip(*(tensor_N.split(_CHUNK) for tensor_N in tensors_N), strict=True)

"""AsyPPO, the method, step by step (Liu et al., "Asymmetric Proximal Policy Optimization: Mini-Critics Boost LLM Reasoning",
arXiv 2510.01656). A step of training, on a batch of responses:

1. :func:`assign_shards`: every response of a group goes to one mini-critic, which alone will train on it.
2. :func:`ensemble_value`: all critics evaluate all responses; their mean is the value, their standard deviation is sigma.
3. GAE on that value, by verl: the advantages, and the returns that are the critics' targets.
4. :func:`select_tokens`: by sigma, the tokens whose advantage is used, and those whose entropy earns the bonus.
   *The* place for another rule or another signal; ``asyppo.selection`` names a function to take its place.
5. :func:`mask_advantage` and, in the actor's loss, :func:`filter_entropy` apply the two selections. Critics, then actor, train.

Shape suffixes: M mini-critics, N positions of a batch's responses, joined to one vector row by row. A response token has
``is_response_N`` = 1; the rest are observations and padding. A tensor of another shape is read in row-major order.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from asyppo_verl import order_statistics
from asyppo_verl.order_statistics import chunks, count_of, select


def assign_shards(rows: Sequence[tuple[str, str]], *, num_critics: int, shard: str = "group") -> list[int]:
    """Deal every response to the one mini-critic that trains on it.

    ``shard="group"``: the sessions of a group, in the order of their ids, go to critics ``(rank + offset) mod M``. The
    offset is 0 when M divides the number of sessions, otherwise a hash of the group id, so that remainders favour no
    critic. ``shard="prompt"``: that hash gives the complete group to one critic. The rows of one session stay together.

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


def ensemble_value(values_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Average the mini-critics and measure how much they disagree.

    ``value = mean_m V_m`` and ``sigma = sqrt(mean_m (V_m - value)^2)``, the population standard deviation; both float32.

    The deviations are taken from the lowest critic and summed in sorted order: equal critics give exactly sigma = 0
    (M = 1 always does) and value = V_1, and the order of the critics changes no bit.
    """
    value_N = torch.empty(values_MN.shape[1:], dtype=torch.float32, device=values_MN.device)
    sigma_N = torch.empty_like(value_N)
    stretches = values_MN.flatten(1).split(order_statistics.CHUNK, dim=1)
    for values, (value, sigma) in zip(stretches, chunks(value_N.view(-1), sigma_N.view(-1)), strict=True):
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        lowest = values.amin(dim=0)
        above = values - lowest
        if len(above) > 2:  # two terms add up to the same bits in either order
            above = above.sort(dim=0).values
        # Not Tensor.mean: with many critics it adds in an order that depends on where a token stands.
        mean_above = sum(above.unbind()) / len(above)
        value.copy_(lowest.add_(mean_above))
        squares = above.sub_(mean_above).square_()
        sigma.copy_(sum(squares.unbind()).div_(len(squares)).sqrt_())
    return value_N, sigma_N


def select_tokens(
    sigma_N: Tensor, is_response_N: Tensor, *, adv_mask_fraction: float, entropy_filter_fraction: float
) -> tuple[Tensor, Tensor]:
    """Both selections of a step: the tokens whose advantage is used, and those whose entropy earns the bonus.

    A function of one's own, named by ``asyppo.selection``, returns the same two, and asks for what it needs by the names of
    its parameters: :mod:`asyppo_verl.selection` lists them.

    Returns:
        Two bool vectors (N,), True = used, and True outside the response tokens.
    """
    keep_adv_N = keep_advantage(sigma_N, is_response_N, fraction=adv_mask_fraction)
    keep_ent_N = keep_entropy(sigma_N, is_response_N, fraction=entropy_filter_fraction)
    return keep_adv_N, keep_ent_N


def keep_advantage(sigma_N: Tensor, is_response_N: Tensor, *, fraction: float) -> Tensor:
    """Tokens whose advantage is used: all but the ``fraction`` (k) of response tokens where the critics agree most.

    Exactly ``floor(k * number of response tokens)`` response tokens are False, those with the lowest sigma; ties go to
    the earliest. If sigma is zero on every response token there is no signal to rank, and nothing is masked.

    Raises:
        ValueError: if ``fraction`` is outside [0, 1) or the shapes differ.
    """
    return ~_select_share(sigma_N, is_response_N, fraction, largest=False)


def keep_entropy(sigma_N: Tensor, is_response_N: Tensor, *, fraction: float) -> Tensor:
    """Tokens whose entropy earns the bonus: all but the ``fraction`` (h) of response tokens where the critics disagree most.

    The rules of :func:`keep_advantage` from the other end. With k + h <= 1 only a tie can put one token into both shares.
    """
    return ~_select_share(sigma_N, is_response_N, fraction, largest=True)


def _select_share(sigma: Tensor, is_response: Tensor, fraction: float, *, largest: bool) -> Tensor:
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction={fraction} must lie in [0, 1)")
    if sigma.shape != is_response.shape:
        raise ValueError(f"shapes differ: {tuple(sigma.shape)} sigmas, {tuple(is_response.shape)} response flags")
    sigma_N, is_response_N = sigma.reshape(-1), is_response.reshape(-1).bool()
    count = count_of(fraction, int(is_response_N.count_nonzero()))
    if count and not (is_response_N & (sigma_N != 0)).any():
        count = 0
    return select(sigma_N, is_response_N, count, largest=largest).view(sigma.shape)


def mask_advantage(advantages_N: Tensor, keep_N: Tensor) -> Tensor:
    """``A_t = 0`` where the advantage is not used; the others keep their bits, so denominators do not change."""
    return torch.where(keep_N, advantages_N, 0)


def filter_entropy(entropy_N: Tensor, keep_N: Tensor) -> Tensor:
    """Zero entropy, and exactly zero gradient, where it earns no bonus; the others keep their bits."""
    return torch.where(keep_N, entropy_N, 0)

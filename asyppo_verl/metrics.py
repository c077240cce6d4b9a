"""Diagnostics of the ensemble of critics: explained variance, disagreement, correlation, and the effect of the masks.

Shape suffixes: M mini-critics, N response positions of a batch in one vector, R vectors over these positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from asyppo_verl.order_statistics import chunks, kth_lowest

SIGMA_QUANTILES = (0.1, 0.5, 0.9, 0.99)


def moments(vectors_RN: Sequence[Tensor], is_response_N: Tensor) -> tuple[Tensor, Tensor]:
    """Means (R,) and population covariances (R, R) of vectors over the response tokens, of which there must be one.

    ``cov = E[(x - s)(y - s)^T] - (E[x] - s)(E[y] - s)^T``, in float64 and chunk by chunk. The shift s is the first response
    token, which keeps the two terms from cancelling where the mean is large.
    """
    first = int(is_response_N.view(torch.uint8).argmax())
    shift_R = torch.stack([vector_N[first].double() for vector_N in vectors_RN])
    sums_R, products_RR = torch.zeros_like(shift_R), torch.zeros_like(shift_R.diag())
    for is_response, *vectors in chunks(is_response_N, *vectors_RN):
        shifted_RN = torch.stack([vector.double() for vector in vectors]).sub_(shift_R[:, None])
        shifted_RN.masked_fill_(~is_response, 0)
        sums_R += shifted_RN.sum(dim=1)
        products_RR += shifted_RN @ shifted_RN.T
    count = int(is_response_N.count_nonzero())
    mean_R = sums_R / count
    return mean_R + shift_R, products_RR / count - mean_R[:, None] * mean_R


def explained_variance(cov_RR: Tensor, value: int, returns: int) -> float:
    """``1 - Var[R - V] / Var[R]`` from covariances: 1 is perfect, 0 is a constant, below 0 is worse than one.

    Var[R] is raised by 1e-5, as in verl's ``critic/vf_explained_var``, so that a batch of equal returns gives a number.
    A constant gives 0 there as well: verl would give 1 to a diverged critic, whose huge values drown
    the rewards in the returns.

    Args:
        cov_RR: covariances of several vectors.
        value, returns: which of them are V and R.
    """
    if cov_RR[value, value] == 0:
        return 0.0
    residual = cov_RR[returns, returns] + cov_RR[value, value] - 2 * cov_RR[value, returns]
    return float(1 - residual / (cov_RR[returns, returns] + 1e-5))


def correlation(cov_MM: Tensor) -> float:
    """Mean Pearson correlation over all pairs of critics; 0 for a pair with a constant critic. Needs M > 1."""
    scale_M = cov_MM.diagonal().sqrt()
    pearson_MM = cov_MM / (scale_M[:, None] * scale_M).clamp_min(torch.finfo(cov_MM.dtype).tiny)
    above = torch.triu_indices(len(cov_MM), len(cov_MM), offset=1)
    return float(pearson_MM[above[0], above[1]].mean())


def quantiles(score_N: Tensor, is_response_N: Tensor, levels: tuple[float, ...]) -> list[float]:
    """Quantiles over response tokens, exact at any size: for every level, the score whose rank is nearest to its share."""
    count = int(is_response_N.count_nonzero())
    return kth_lowest(score_N, is_response_N, [max(1, round(level * count)) for level in levels]).tolist()


def ensemble_metrics(
    values_MN: Tensor, value_N: Tensor, sigma_N: Tensor, returns_N: Tensor, is_response_N: Tensor
) -> dict:
    """Diagnostics of the critics over the batch, of which a token must be a response's, keyed by metric name."""
    num_critics = len(values_MN)
    mean_R, cov_RR = moments([*values_MN, value_N, returns_N, sigma_N], is_response_N)
    value, returns, sigma = range(num_critics, num_critics + 3)
    metrics = {
        f"asyppo/critic_{index}/explained_var": explained_variance(cov_RR, index, returns)
        for index in range(num_critics)
    }
    metrics["asyppo/explained_var"] = explained_variance(cov_RR, value, returns)
    metrics["asyppo/sigma/mean"] = float(mean_R[sigma])
    for level, quantile in zip(SIGMA_QUANTILES, quantiles(sigma_N, is_response_N, SIGMA_QUANTILES), strict=True):
        metrics[f"asyppo/sigma/p{round(100 * level)}"] = quantile
    if num_critics > 1:
        metrics["asyppo/critic_correlation"] = correlation(cov_RR[:num_critics, :num_critics])
    return metrics


def tied_share(sigma_N: Tensor, keep_adv_N: Tensor, is_response_N: Tensor) -> float:
    """Share of the masked tokens that ties decided: those with the highest masked sigma, if a kept token has it as well.

    Some ties are real: the first tokens of one prompt's responses have the same past, so the same sigma.
    """
    masked, highest = 0, float("-inf")
    for sigma, keep, is_response in chunks(sigma_N, keep_adv_N, is_response_N):
        masked_sigma = sigma[is_response & ~keep]
        if len(masked_sigma):
            masked, highest = masked + len(masked_sigma), max(highest, float(masked_sigma.max()))
    kept_ties = masked_ties = 0
    for sigma, keep, is_response in chunks(sigma_N, keep_adv_N, is_response_N):
        is_tied = is_response & (sigma == highest)
        kept_ties += int((is_tied & keep).count_nonzero())
        masked_ties += int((is_tied & ~keep).count_nonzero())
    return masked_ties / masked if kept_ties and masked else 0.0


def selection_metrics(
    advantages_N: Tensor, sigma_N: Tensor, keep_adv_N: Tensor, keep_ent_N: Tensor, is_response_N: Tensor
) -> dict:
    """Share of response tokens masked and filtered, of ties among them, and the mean |advantage| kept and masked.

    Args:
        advantages_N: advantages before the mask.
        sigma_N: disagreement of the critics.
        keep_adv_N, keep_ent_N: results of the two selections.
        is_response_N: True on response tokens.
    """
    masked = kept = filtered = 0
    masked_size = kept_size = 0.0
    for advantage, keep_adv, keep_ent, is_response in chunks(advantages_N, keep_adv_N, keep_ent_N, is_response_N):
        is_masked, is_kept, size = is_response & ~keep_adv, is_response & keep_adv, advantage.abs()
        masked += int(is_masked.count_nonzero())
        kept += int(is_kept.count_nonzero())
        filtered += int((is_response & ~keep_ent).count_nonzero())
        masked_size += float(torch.where(is_masked, size, 0).sum())
        kept_size += float(torch.where(is_kept, size, 0).sum())
    return {
        "asyppo/adv_masked_fraction": masked / max(1, masked + kept),
        "asyppo/entropy_filtered_fraction": filtered / max(1, masked + kept),
        "asyppo/sigma/tied": tied_share(sigma_N, keep_adv_N, is_response_N),
        "asyppo/adv_abs_kept": kept_size / max(1, kept),
        "asyppo/adv_abs_masked": masked_size / max(1, masked),
    }


def mask_metrics(advantages_N: Tensor, returns_N: Tensor, keep_adv_N: Tensor, is_response_N: Tensor) -> dict:
    """What the masked tokens are, beside as many drawn at random: what a random mask gives is 1 and 0.

    ``adv_ratio = E[|A| of masked tokens] / E[|A|]``, and the correlation of being masked with the return. Nothing, where no
    response token is masked.

    Args:
        advantages_N: advantages before the mask.
        returns_N: returns of the response tokens, the reward where ``critic_lam`` and gamma are 1.
        keep_adv_N: False where the advantage is masked.
        is_response_N: True on response tokens, of which there must be one.
    """
    is_masked_N = ~keep_adv_N & is_response_N
    if not is_masked_N.any():
        return {}
    mean_R, cov_RR = moments([is_masked_N, advantages_N.abs(), returns_N], is_response_N)
    masked, size, _ = mean_R.tolist()
    return {
        "asyppo/mask/adv_ratio": 1 + float(cov_RR[0, 1]) / (masked * size) if size else 1.0,
        "asyppo/mask/return_correlation": correlation(cov_RR[[0, 2]][:, [0, 2]]),
    }

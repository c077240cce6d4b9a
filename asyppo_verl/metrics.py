"""What the ensemble of critics is worth: explained variance, disagreement, correlation, and what the masks did.

Shape suffixes: M mini-critics, N response positions of a batch in one vector.
"""

import torch
from torch import Tensor

from asyppo_verl.asyppo import select_kth

SIGMA_QUANTILES = (0.1, 0.5, 0.9, 0.99)


def explained_variance(values_K: Tensor, returns_K: Tensor) -> float:
    """``1 - Var[R - V] / Var[R]`` over all K response tokens: 1 is perfect, 0 is a constant, below 0 is worse than one.

    Var[R] is raised by 1e-5, as in verl's ``critic/vf_explained_var``, so that a batch of equal returns gives a number.
    """
    return 1 - float((returns_K - values_K).var(correction=0) / (returns_K.var(correction=0) + 1e-5))


def correlation(values_MK: Tensor) -> float:
    """Mean Pearson correlation over all pairs of critics; 0 for a pair with a constant critic. Needs M > 1."""
    centred_MK = values_MK - values_MK.mean(dim=1, keepdim=True)
    products_MM = centred_MK @ centred_MK.T
    scale_M = products_MM.diagonal().sqrt()
    pearson_MM = products_MM / (scale_M[:, None] * scale_M).clamp_min(torch.finfo(products_MM.dtype).tiny)
    above = torch.triu_indices(len(values_MK), len(values_MK), offset=1)
    return float(pearson_MM[above[0], above[1]].mean())


def quantiles(score_N: Tensor, is_response_N: Tensor, levels: tuple[float, ...]) -> list[float]:
    """Exact quantiles over response tokens at any size: the lowest score that at least the given share does not exceed."""
    count = int(is_response_N.count_nonzero())
    return [float(select_kth(score_N, is_response_N, max(1, round(level * count)))) for level in levels]


def ensemble_metrics(
    values_MN: Tensor, value_N: Tensor, sigma_N: Tensor, returns_N: Tensor, is_response_N: Tensor
) -> dict:
    """Diagnostics of the critics over the whole batch, keyed by metric name; empty for a batch without response tokens."""
    if not bool(is_response_N.any()):
        return {}
    returns_K = returns_N[is_response_N].float()
    values_MK = values_MN[:, is_response_N].float()
    metrics = {
        f"asyppo/critic_{index}/explained_var": explained_variance(values_K, returns_K)
        for index, values_K in enumerate(values_MK)
    }
    metrics["asyppo/explained_var"] = explained_variance(value_N[is_response_N].float(), returns_K)
    metrics["asyppo/sigma/mean"] = float(sigma_N[is_response_N].mean())
    for level, value in zip(SIGMA_QUANTILES, quantiles(sigma_N, is_response_N, SIGMA_QUANTILES), strict=True):
        metrics[f"asyppo/sigma/p{round(100 * level)}"] = value
    if len(values_MN) > 1:
        metrics["asyppo/critic_correlation"] = correlation(values_MK)
    return metrics


def selection_metrics(advantages_N: Tensor, keep_adv_N: Tensor, keep_ent_N: Tensor, is_response_N: Tensor) -> dict:
    """Share of response tokens masked and filtered, and the mean |advantage| that was kept and that was masked.

    Args:
        advantages_N: advantages before the mask.
        keep_adv_N, keep_ent_N: results of the two selections.
        is_response_N: True on response tokens.
    """
    count = max(1, int(is_response_N.count_nonzero()))
    is_masked_N = is_response_N & ~keep_adv_N
    size_N = advantages_N.abs()
    masked, kept = int(is_masked_N.count_nonzero()), int((is_response_N & keep_adv_N).count_nonzero())
    return {
        "asyppo/adv_masked_fraction": masked / count,
        "asyppo/entropy_filtered_fraction": int((is_response_N & ~keep_ent_N).count_nonzero()) / count,
        "asyppo/adv_abs_kept": float((size_N * (is_response_N & keep_adv_N)).sum()) / max(1, kept),
        "asyppo/adv_abs_masked": float((size_N * is_masked_N).sum()) / max(1, masked),
    }

"""What the tokens of many runs earn: the one page's credit for a stack of runs, with every variant that the study compares.

Tests hold :func:`credit` to that of :mod:`recipe.asyppo.one_page`. Shape suffixes as there; R runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asyppo_verl import asyppo
from recipe.asyppo.one_page import Settings


@dataclass(frozen=True)
class Run(Settings):
    """One run. Runs that train together agree in ``free_steps`` and in ``prompts`` to ``entropy_coeff``."""

    seed: int = 0
    free_steps: int = 0  # steps of value pre-training before the run, not counted
    is_oracle: bool = False  # exact values instead of critics' (num_critics=0)
    mask_by: str = (
        "sigma"  # sigma, relative (to its mean at that position), highest, random, surprisal (of the drawn token)
    )
    mask_from: float | None = None  # explained variance of a step's values from which on its tokens are selected
    update_first: bool = False  # critics learn from a step before they value it, as with asyppo.update_critics_first
    adaptive_lam: bool = False  # as asyppo.adaptive_lam
    prompts: int = 16
    responses: int = 8
    mini_batches: int = 4
    epochs: int = 2
    critic_epochs: int = 3
    entropy_coeff: float = 0.001
    critic_lr: float = 1e-3
    lam: float = 0.95
    critic_size: tuple[int, int] = (16, 1)


def gae(rewards_RBT: Tensor, values_RBT: Tensor, is_response_RBT: Tensor, lam_R: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`one_page.gae` of all runs: advantages, whitened within each run, and returns; both (R, B, T).

    As in verl, tokens that are no response (observations) are passed over.
    """
    advantage_RB = next_value_RB = torch.zeros_like(values_RBT[..., 0])
    advantages = []
    for t in reversed(range(values_RBT.shape[-1])):
        is_response_RB, value_RB = is_response_RBT[..., t], values_RBT[..., t]
        delta_RB = rewards_RBT[..., t] + next_value_RB - value_RB
        advantage_RB = torch.where(is_response_RB, delta_RB + lam_R[:, None] * advantage_RB, advantage_RB)
        next_value_RB = torch.where(is_response_RB, value_RB, next_value_RB)
        advantages.append(advantage_RB)
    advantages_RBT = torch.stack(advantages[::-1], -1)
    count_R11 = is_response_RBT.sum((1, 2), keepdim=True)
    mean_R11 = (advantages_RBT * is_response_RBT).sum((1, 2), keepdim=True) / count_R11
    squares_RBT = ((advantages_RBT - mean_R11) * is_response_RBT) ** 2
    variance_R11 = squares_RBT.sum((1, 2), keepdim=True) / (count_R11 - 1)
    return (advantages_RBT - mean_R11) * (variance_R11 + 1e-8).rsqrt(), advantages_RBT + values_RBT


def group_advantage(run: Settings, rewards_RBT: Tensor, is_response_RBT: Tensor) -> Tensor:
    """GRPO: the reward, whitened over the responses to the same prompt."""
    rewards_RGN = rewards_RBT.sum(-1).unflatten(1, (-1, run.responses))
    deviation_RG1, mean_RG1 = torch.std_mean(rewards_RGN, -1, keepdim=True)
    return ((rewards_RGN - mean_RG1) / (deviation_RG1 + 1e-6)).flatten(1, 2)[..., None] * is_response_RBT


def keep(score_RBT: Tensor, is_response_RBT: Tensor, fractions: Sequence[float], *, largest: bool) -> Tensor:
    """:func:`asyppo.keep_advantage` of all runs, or with ``largest`` :func:`asyppo.keep_entropy`; a share for each run."""
    outside = float("-inf") if largest else float("inf")
    score_RN = score_RBT.masked_fill(~is_response_RBT, outside).flatten(1)
    order_RN = score_RN.argsort(dim=1, descending=largest, stable=True)
    rank_RN = torch.empty_like(order_RN).scatter_(1, order_RN, torch.arange(order_RN.shape[1]).expand_as(order_RN))
    has_signal_R = ((score_RBT != 0) & is_response_RBT).any(2).any(1)
    fraction_R = torch.tensor(fractions, dtype=torch.float64)
    count_R = (fraction_R * is_response_RBT.sum((1, 2)) + 1e-6).floor() * has_signal_R
    return (rank_RN >= count_R[:, None]).view(score_RBT.shape)


def mask_score(runs: Sequence[Run], sigma_RBT: Tensor, surprisal_RBT: Tensor) -> Tensor:
    """What the advantage mask ranks, for every run: sigma, or what takes its place."""
    scores = {"sigma": sigma_RBT, "highest": -sigma_RBT, "surprisal": surprisal_RBT}
    scores["relative"] = sigma_RBT / sigma_RBT.mean(1, keepdim=True)
    scores["random"] = torch.rand_like(sigma_RBT)
    return torch.stack([scores[run.mask_by][row] for row, run in enumerate(runs)])


def credit(
    runs: Sequence[Run],
    rewards_RBT: Tensor,
    values_MRBT: Tensor,
    surprisal_RBT: Tensor,
    is_response_RBT: Tensor,
    lams: Sequence[float] | None = None,
    explained: list[float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, list[float]]]:
    """:func:`one_page.credit` of all runs; with no critics (M = 0) it is GRPO's. The metrics have a number for every run.

    ``lams`` take the place of the runs' own, ``explained`` that of what the values explain (before their critics learned).
    """
    if len(values_MRBT) == 0:
        return group_advantage(runs[0], rewards_RBT, is_response_RBT), rewards_RBT, is_response_RBT, {}
    lam_R = torch.tensor([run.lam for run in runs] if lams is None else lams)
    critic_lam_R = torch.tensor([run.critic_lam for run in runs])
    value_RBT, sigma_RBT = asyppo.ensemble_value(values_MRBT)
    advantages_RBT, _ = gae(rewards_RBT, value_RBT, is_response_RBT, lam_R)
    _, returns_RBT = gae(rewards_RBT, value_RBT, is_response_RBT, critic_lam_R)
    metrics = {"explained_var": explained or explained_variance(value_RBT, rewards_RBT, is_response_RBT).tolist()}
    if len(values_MRBT) == 1:
        return advantages_RBT, returns_RBT, is_response_RBT, metrics
    selects = [
        run.mask_from is None or explained >= run.mask_from
        for run, explained in zip(runs, metrics["explained_var"], strict=True)
    ]
    k = [run.adv_mask_fraction * here for run, here in zip(runs, selects, strict=True)]
    h = [run.entropy_filter_fraction * here for run, here in zip(runs, selects, strict=True)]
    keep_adv_RBT = keep(mask_score(runs, sigma_RBT, surprisal_RBT), is_response_RBT, k, largest=False)
    keep_ent_RBT = keep(sigma_RBT, is_response_RBT, h, largest=True)
    size_RBT = advantages_RBT.abs() * is_response_RBT
    is_masked_RBT = is_response_RBT & ~keep_adv_RBT
    masked_R = (size_RBT * is_masked_RBT).sum((1, 2)) / is_masked_RBT.sum((1, 2)).clamp_min(1)
    kept_R = (size_RBT * keep_adv_RBT).sum((1, 2)) / (is_response_RBT & keep_adv_RBT).sum((1, 2))
    metrics |= {"masked_to_kept": (masked_R / kept_R).tolist()}
    return asyppo.mask_advantage(advantages_RBT, keep_adv_RBT), returns_RBT, keep_ent_RBT, metrics


def explained_variance(value_RBT: Tensor, rewards_RBT: Tensor, is_response_RBT: Tensor) -> Tensor:
    """``1 - Var[R - V] / Var[R]`` (R,) over response tokens, with the reward that the response got in the end as R."""
    return_RBT = rewards_RBT.sum(-1, keepdim=True).expand_as(value_RBT)

    def variance_R(x_RBT: Tensor) -> Tensor:
        count_R = is_response_RBT.sum((1, 2))
        mean_R11 = ((x_RBT * is_response_RBT).sum((1, 2)) / count_R)[:, None, None]
        return (((x_RBT - mean_R11) * is_response_RBT) ** 2).sum((1, 2)) / count_R

    return 1 - variance_R(return_RBT - value_RBT) / (variance_R(return_RBT) + 1e-5)

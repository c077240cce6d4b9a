"""Batches that nothing should be trained on: each is refused before any weight moves, with the step and the cure."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_rollouts(keys: Sequence[str], step: int) -> None:
    """Raises ValueError if no rollout gave a row."""
    if not keys:
        raise ValueError(
            f"step {step} has no response at all: every rollout failed. The log says why; look at the agent loop, the reward "
            "function and data.max_prompt_length"
        )


def check_responses(is_response_N: Tensor, step: int) -> None:
    """Raises ValueError if no row has a response token."""
    if not is_response_N.any():
        raise ValueError(
            f"step {step} has no response token to train on: every response is empty or masked. Look at the stop tokens, "
            "data.max_response_length, and what the agent loop puts into response_mask"
        )


def check_values(values_MN: Tensor, step: int) -> None:
    """Raises ValueError if a mini-critic gave a value that is not finite."""
    for index, values_N in enumerate(values_MN):
        if not torch.isfinite(values_N).all():
            raise ValueError(
                f"mini-critic {index} gave non-finite values in step {step}; nothing was trained on them. Lower "
                "critic.optim.lr or critic.optim.clip_grad, and resume from the last checkpoint"
            )


def check_returns(returns_N: Tensor, is_response_N: Tensor, keys: Sequence[str], offsets: Tensor, step: int) -> None:
    """Raises ValueError if a return is not finite: as the values are, the rewards cannot be.

    Args:
        returns_N, is_response_N: over the response positions of all rows.
        keys, offsets: row i is called ``keys[i]`` and is ``[offsets[i], offsets[i + 1])``.
    """
    is_broken_N = ~torch.isfinite(returns_N) & is_response_N
    if is_broken_N.any():
        rows = torch.searchsorted(offsets, is_broken_N.nonzero().flatten(), right=True).sub(1).unique().tolist()
        raise ValueError(
            f"{len(rows)} of {len(keys)} responses of step {step} have rewards that are not finite, first {keys[rows[0]]}; "
            "nothing was trained on them. Let the reward function (reward.custom_reward_function.path) or reward model "
            "return finite numbers, and resume from the last checkpoint"
        )

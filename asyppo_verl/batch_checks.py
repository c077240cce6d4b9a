"""Batches that nothing should be trained on, and critics that learn nothing: errors and warnings that name step and remedy."""

import logging
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

TIED = 0.1
"""Share of the masked tokens that ties may decide without a warning."""

STEPS_WITHOUT_UPDATE = 3
"""Steps in a row in which a critic may make no finite update."""

LOSS_SCALE_HALVINGS = 16
"""As many more with fp16: torch's loss scale begins at 2**16, and each gradient that is not finite halves it."""

STEPS_TO_LEARN = 50
"""Steps after which critics that explain nothing are worth a warning."""

EXPLAINS_NOTHING = 0.02
"""Critics are blind if the mean value's median explained variance over these steps is below this."""


def check_rollouts(keys: Sequence[str], step: int) -> None:
    """Raise ValueError if no rollout gave a row."""
    if not keys:
        raise ValueError(
            f"step {step} has no response at all: every rollout failed. The log says why; look at the agent loop, the reward "
            "function and data.max_prompt_length"
        )


def check_responses(is_response_N: Tensor, step: int) -> None:
    """Raise ValueError if no row has a response token."""
    if not is_response_N.any():
        raise ValueError(
            f"step {step} has no response token to train on: every response is empty or masked. Look at the stop tokens, "
            "data.max_response_length, and what the agent loop puts into response_mask"
        )


def check_values(values_MN: Tensor, step: int) -> None:
    """Raise ValueError if a mini-critic gave a value that is not finite."""
    for index, values_N in enumerate(values_MN):
        if not torch.isfinite(values_N).all():
            raise ValueError(
                f"mini-critic {index} gave non-finite values in step {step}; nothing was trained on them. Lower "
                "critic.optim.lr or critic.optim.clip_grad, and resume from the last checkpoint"
            )


def check_returns(returns_N: Tensor, is_response_N: Tensor, keys: Sequence[str], offsets: Tensor, step: int) -> None:
    """Raise ValueError if a return is not finite: as the values are, the rewards cannot be.

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


def check_updates(index: int, idle: int, step: int, is_scaled: bool = False) -> None:
    """Raise ValueError if a mini-critic's updates were all skipped for some steps in a row.

    Args:
        index: of the critic.
        idle: for how many steps now, including this one.
        step: this one.
        is_scaled: the critic computes in fp16, so that verl scales its loss.
    """
    if idle >= STEPS_WITHOUT_UPDATE + is_scaled * LOSS_SCALE_HALVINGS:
        raise ValueError(
            f"mini-critic {index} made no finite update in steps {step - idle + 1} to {step}: all its gradients were infinite "
            f"or nan. Lower critic.optim.lr (or asyppo.critic_overrides.{index}.optim.lr), or raise its lr_warmup_steps, and "
            "resume from a checkpoint before these steps"
        )


def warn_of_ties(share: float, step: int) -> bool:
    """Warn if ties decided too many of the masked tokens; True if so."""
    if share > TIED:
        logger.warning(
            f"step {step}: ties in sigma decided {share:.0%} of the masked tokens (asyppo/sigma/tied), by the order of rows: "
            "the critics are nearly equal. Let them differ: other heads (asyppo.head_seed), other models "
            "(asyppo.critic_overrides.<m>.model.path), asyppo.shard=group"
        )
    return share > TIED


def warn_of_blind_critics(explained: Sequence[float], step: int) -> bool:
    """Warn if the ensemble explained nothing for many steps while its disagreement masks tokens; True if so.

    Args:
        explained: its explained variance in the last steps, at least one, with :data:`STEPS_TO_LEARN` of them or fewer.
        step: the last of them.
    """
    median = statistics.median(explained)  # one step of equal returns can be hundreds below 0
    is_blind = len(explained) >= STEPS_TO_LEARN and median < EXPLAINS_NOTHING
    if is_blind:
        logger.warning(
            f"steps {step - len(explained) + 1} to {step}: the critics explain nothing of the returns (median of "
            f"asyppo/explained_var {median:.3f}), so the masks follow noise. Train the critics first "
            "(trainer.critic_warmup), on more responses (asyppo.shard=none), more often (critic.ppo_epochs=4), or take "
            "larger ones; or let the masks wait for them (asyppo.selection=asyppo_verl.selection.once_explained)"
        )
    return is_blind

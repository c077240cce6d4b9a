"""verl's actor loss with the entropy filter applied; every policy loss mode and later term of verl keeps working."""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss

from asyppo_verl.asyppo import filter_entropy
from asyppo_verl.batch_io import KEEP_ENTROPY


def asyppo_actor_loss(
    config: ActorConfig, model_output: dict[str, Any], data: TensorDict, dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """``ppo_loss`` after the entropy of filtered tokens has been left out.

    The sum runs over the kept tokens and the denominator stays that of all response tokens, so ``actor/entropy_loss`` is the
    entropy that earns the bonus.

    Args:
        config, model_output, dp_group: as ``ppo_loss`` takes them.
        data: as ``ppo_loss`` takes it, with the jagged (B, T) bool field ``asyppo_keep_entropy``.
    """
    entropy = model_output.get("entropy")
    if entropy is not None:
        entropy_N = entropy.values() if entropy.is_nested else entropy
        kept_N = filter_entropy(entropy_N, _on_sequences(data[KEEP_ENTROPY], data))
        model_output = {**model_output, "entropy": kept_N}
    return ppo_loss(config, model_output, data, dp_group)


def _on_sequences(keep: Tensor, data: TensorDict) -> Tensor:
    """Move flags from response positions to the sequence positions whose output predicts them; True elsewhere."""
    ends = (data["prompts"].offsets().diff() + data["responses"].offsets().diff()).cumsum(0).tolist()
    keep_N = torch.ones(ends[-1], dtype=torch.bool, device=keep.device)
    for end, keep_T in zip(ends, keep.unbind(), strict=True):
        keep_N[end - len(keep_T) - 1 : end - 1] = keep_T
    return keep_N

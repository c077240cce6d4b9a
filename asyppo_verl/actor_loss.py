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
        filtered_N = filter_entropy(entropy_N, _on_sequences(data[KEEP_ENTROPY], data))
        if entropy.is_nested:
            filtered_N = torch.nested.nested_tensor_from_jagged(filtered_N, entropy.offsets())
        model_output = {**model_output, "entropy": filtered_N}
    return ppo_loss(config, model_output, data, dp_group)


def _on_sequences(keep: Tensor, data: TensorDict) -> Tensor:
    """Move flags from response positions to the sequence positions whose output predicts them; True elsewhere.

    Position ``prompt + t - 1`` of a row predicts response token t.
    """
    prompt_B, response_B = data["prompts"].offsets().diff(), data["responses"].offsets().diff()
    sequence_B = prompt_B + response_B
    first_B = sequence_B.cumsum(0) - response_B - 1
    before_B = response_B.cumsum(0) - response_B
    shift_K = (first_B - before_B).repeat_interleave(response_B)
    keep_K = keep.values().bool()
    keep_N = torch.ones(int(sequence_B.sum()), dtype=torch.bool, device=keep_K.device)
    keep_N[torch.arange(len(keep_K), device=keep_K.device) + shift_K] = keep_K
    return keep_N

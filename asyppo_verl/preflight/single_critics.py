"""What every single mini-critic is asked, its own settings merged in."""

import copy
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, open_dict

from asyppo_verl.config import AsyPPOConfig
from asyppo_verl.critic_settings import CriticNode
from asyppo_verl.placement import check_sharding, critic_ranks, fitting_ranks, ranks_key
from asyppo_verl.preflight.choices import check_optimizer
from asyppo_verl.preflight.kinds import check_critic_kinds
from asyppo_verl.preflight.quantities import check_critic_numbers


def check_critic(node: CriticNode, config: Any, asyppo: AsyPPOConfig) -> None:
    """Refuse settings with which this critic could not train; reads the configuration and nothing else.

    Raises:
        ValueError: naming key, value and cure.
    """
    critic = node.config
    check_critic_kinds(critic, node.key)
    if (critic.model.get("lora_rank") or 0) > 0 or critic.model.get("lora_adapter_path"):
        name = "lora_rank" if critic.model.get("lora_rank") else "lora_adapter_path"
        raise ValueError(
            f"{node.key(f'model.{name}')}={critic.model[name]}: verl freezes the value head of a LoRA critic, which would "
            "then never learn; set critic.model.lora_rank=0, and lora_adapter_path=null"
        )
    check_critic_numbers(critic, node.key, config.data.max_prompt_length + config.data.max_response_length)
    ranks = critic_ranks(config, asyppo)
    place = f"that critic {node.index} has ({ranks_key(asyppo)})"
    strategy = ("critic.strategy", critic.strategy)
    check_sharding(node.key("fsdp.fsdp_size"), critic.fsdp.fsdp_size, strategy, ranks, place)
    check_optimizer(node)
    _check_batch_sizes(node, config, asyppo)


def check_build(node: DictConfig, name: Callable[[str], str]) -> None:
    """Let verl make its own objects of a node, as the workers will.

    Args:
        node: one with verl's ``_target_``: a ``critic`` node, or that of a model.
        name: from a key of the whole configuration to what to call it in a message.

    Raises:
        ValueError: with what verl says of it, in one line.
    """
    from hydra.errors import InstantiationException
    from verl.utils.config import omega_conf_to_dataclass

    node = copy.deepcopy(node)
    with open_dict(node):
        # The tokenizers have been read already, and take the longest.
        node.get("model", node).update(load_tokenizer=False, custom_chat_template=None)
    try:
        omega_conf_to_dataclass(node)
    except InstantiationException as error:
        said = " ".join(f"{type(error.__cause__).__name__} {error.__cause__ or ''}".split())
        key = str(error).rpartition("full_key: ")[2]
        raise ValueError(f"{name(key)}: verl cannot use these settings ({said}); correct or remove them") from error


def _check_batch_sizes(node: CriticNode, config: Any, asyppo: AsyPPOConfig) -> None:
    critic, n = node.config, config.actor_rollout_ref.rollout.n
    mini_batch, micro_batch = critic.ppo_mini_batch_size, critic.ppo_micro_batch_size_per_gpu
    responses = mini_batch * n
    data_parallel = critic_ranks(config, asyppo) // critic.fsdp.ulysses_sequence_parallel_size
    # Several critics' training calls are filled up to what ranks and micro-batches want.
    unit = micro_batch if asyppo.num_critics == 1 and not critic.use_dynamic_bsz else 1
    if responses % (unit * data_parallel):
        ranks = fitting_ranks(config, asyppo, critic) if responses % unit == 0 else ""
        raise ValueError(
            f"critic.ppo_mini_batch_size={mini_batch} prompts x rollout.n={n} = {responses} responses cannot be cut into "
            f"{data_parallel} data-parallel ranks"
            + ("" if unit == 1 else f" x {node.key('ppo_micro_batch_size_per_gpu')}={micro_batch}")
            + f"; make the product of the first two a multiple of {unit * data_parallel}"
            + (f", or give the critics {ranks} GPUs ({ranks_key(asyppo)})" if ranks else "")
        )
    name = "ppo_infer_micro_batch_size_per_gpu"
    name = name if critic.get(name) else "forward_micro_batch_size_per_gpu"
    infer = critic.get(name)
    if not critic.use_dynamic_bsz and infer and responses % (data_parallel * infer):
        raise ValueError(
            f"{node.key(name)}={infer} does not divide the {responses} responses of a critic "
            f"mini-batch on {data_parallel} data-parallel ranks; choose a divisor of {responses // data_parallel}"
        )

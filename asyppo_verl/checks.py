"""What of verl's configuration does not go together with AsyPPO; reads the configuration and nothing else."""

from typing import Any

from asyppo_verl.config import TRAINER_PREFIX, AsyPPOConfig, nearest
from asyppo_verl.number_checks import check_numbers
from asyppo_verl.placement import check_placement, critic_ranks, fitting_ranks, ranks_key

TRAINER_MODES = ("sync", "colocate_async", "separate_async")
"""verl's trainers, ``trainer.v1.trainer_mode``."""


def check_against_verl(config: Any, asyppo: AsyPPOConfig) -> None:
    """Refuse verl settings under which AsyPPO could not do what was asked.

    Raises:
        ValueError: naming key, value and cure.
    """
    if not config.trainer.use_v1:
        raise ValueError(
            "trainer.use_v1=False: AsyPPO needs verl's V1 trainer; remove the override or set trainer.use_v1=True"
        )
    mode = str(config.trainer.v1.trainer_mode).removeprefix(TRAINER_PREFIX)
    if mode not in TRAINER_MODES:
        raise ValueError(
            f"trainer.v1.trainer_mode={mode!r} is not a trainer of verl{nearest(mode, TRAINER_MODES)}; "
            f"set one of {', '.join(TRAINER_MODES)}"
        )
    if config.critic.enable is False:
        raise ValueError(
            "critic.enable=False: AsyPPO is PPO with critics; remove the override, or use adv_estimator=grpo"
        )
    if config.critic.strategy not in ("fsdp", "fsdp2"):
        raise ValueError(f"critic.strategy={config.critic.strategy!r}: the mini-critics run on FSDP; set fsdp or fsdp2")
    if (config.get("distillation") or {}).get("enabled", False):
        raise ValueError(
            "distillation.enabled=True cannot be combined with AsyPPO, whose actor loss replaces verl's; disable it"
        )
    if config.critic.model.get("lora_rank", 0) > 0 or config.critic.model.get("lora_adapter_path"):
        raise ValueError(
            f"critic.model.lora_rank={config.critic.model.get('lora_rank')}: verl freezes the value head of a LoRA critic, "
            "which would then never learn; set critic.model.lora_rank=0"
        )
    check_numbers(config)
    _check_checkpoints(config)
    _check_loss_mode(config.actor_rollout_ref.actor.policy_loss.get("loss_mode", "vanilla"), asyppo)
    check_placement(config, asyppo)
    _check_batch_sizes(config, asyppo)


CHECKPOINT_CONTENTS = ("model", "optimizer", "extra", "hf_model")
"""What verl's checkpoints can hold."""


def _check_checkpoints(config: Any) -> None:
    if config.trainer.get("remove_previous_ckpt_in_save"):
        raise ValueError(
            "trainer.remove_previous_ckpt_in_save=True removes the last checkpoint before the next one is whole; remove it "
            "and set trainer.max_actor_ckpt_to_keep=1 and trainer.max_critic_ckpt_to_keep=1"
        )
    if not config.trainer.default_local_dir:
        raise ValueError(
            f"trainer.default_local_dir={config.trainer.default_local_dir!r} must name the folder for checkpoints"
        )
    for key in ("save_contents", "load_contents"):
        for name in config.critic.checkpoint[key]:
            if name not in CHECKPOINT_CONTENTS:
                raise ValueError(
                    f"critic.checkpoint.{key} names {name!r}, which verl would leave out in silence"
                    f"{nearest(name, CHECKPOINT_CONTENTS)}; valid: {', '.join(CHECKPOINT_CONTENTS)}"
                )


def _check_loss_mode(loss_mode: str, asyppo: AsyPPOConfig) -> None:
    if loss_mode == "dro" and asyppo.adv_mask_fraction > 0:
        raise ValueError(
            "actor_rollout_ref.actor.policy_loss.loss_mode='dro' moves tokens whose advantage is 0, so the advantage mask "
            "would not hold; choose another loss_mode or set asyppo.adv_mask_fraction=0"
        )


def _check_batch_sizes(config: Any, asyppo: AsyPPOConfig) -> None:
    n, num_critics = config.actor_rollout_ref.rollout.n, asyppo.num_critics
    if asyppo.shard == "group" and n < num_critics:
        raise ValueError(
            f"actor_rollout_ref.rollout.n={n} is below asyppo.num_critics={num_critics}: every mini-critic needs a response "
            "of every prompt; raise n or lower num_critics"
        )
    mini_batch, micro_batch = config.critic.ppo_mini_batch_size, config.critic.ppo_micro_batch_size_per_gpu
    responses = mini_batch * n
    data_parallel = critic_ranks(config, asyppo) // config.critic.fsdp.get("ulysses_sequence_parallel_size", 1)
    share = asyppo.num_shards * (1 if config.critic.use_dynamic_bsz else (micro_batch or 1))
    if responses % (share * data_parallel):
        ranks = fitting_ranks(config, asyppo) if responses % share == 0 else ""
        raise ValueError(
            f"critic.ppo_mini_batch_size={mini_batch} prompts x rollout.n={n} = {responses} responses cannot be cut into "
            f"{asyppo.num_shards} shards x {data_parallel} data-parallel ranks"
            + ("" if config.critic.use_dynamic_bsz else f" x critic.ppo_micro_batch_size_per_gpu={micro_batch}")
            + f"; make the product of the first two a multiple of {share * data_parallel}"
            + (f", or give the critics {ranks} GPUs ({ranks_key(asyppo)})" if ranks else "")
        )
    infer = config.critic.get("ppo_infer_micro_batch_size_per_gpu") or config.critic.get(
        "forward_micro_batch_size_per_gpu"
    )
    if not config.critic.use_dynamic_bsz and infer and responses % (data_parallel * infer):
        raise ValueError(
            f"critic.forward_micro_batch_size_per_gpu={infer} does not divide the {responses} responses of a critic "
            f"mini-batch on {data_parallel} data-parallel ranks; choose a divisor of {responses // data_parallel}"
        )


def notices(config: Any, asyppo: AsyPPOConfig) -> list[str]:
    """What the user should be told once at start, though nothing is wrong."""
    lines = []
    if asyppo.entropy_filter_fraction > 0 and config.actor_rollout_ref.actor.entropy_coeff == 0:
        lines.append(
            f"asyppo.entropy_filter_fraction={asyppo.entropy_filter_fraction} is idle: "
            "actor_rollout_ref.actor.entropy_coeff=0 gives no entropy bonus to filter"
        )
    loss_mode = config.actor_rollout_ref.actor.policy_loss.get("loss_mode", "vanilla")
    if asyppo.adv_mask_fraction > 0 and loss_mode in ("kl_cov", "clip_cov", "geo_mean"):
        lines.append(
            f"actor_rollout_ref.actor.policy_loss.loss_mode={loss_mode!r} looks at all tokens of a batch at once, so masked "
            "advantages change what it does to other tokens"
            + (" and may still move themselves" if loss_mode == "kl_cov" else "")
        )
    return lines

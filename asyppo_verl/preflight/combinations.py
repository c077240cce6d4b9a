"""What of verl's configuration does not go together with AsyPPO; reads the configuration and nothing else."""

from typing import Any

from asyppo_verl.config import TRAINER_PREFIX, AsyPPOConfig, nearest
from asyppo_verl.placement import check_placement
from asyppo_verl.preflight.choices import check_choices
from asyppo_verl.preflight.quantities import check_numbers, is_count

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
    mode = trainer_mode(config)
    if mode not in TRAINER_MODES:
        raise ValueError(
            f"trainer.v1.trainer_mode={mode!r} is not a trainer of verl{nearest(mode, TRAINER_MODES)}; "
            f"set one of {', '.join(TRAINER_MODES)}"
        )
    if config.critic.enable not in (None, True):
        raise ValueError(
            f"critic.enable={config.critic.enable}: AsyPPO is PPO with critics; remove the override, or use adv_estimator=grpo"
        )
    if config.critic.strategy not in ("fsdp", "fsdp2"):
        raise ValueError(f"critic.strategy={config.critic.strategy!r}: the mini-critics run on FSDP; set fsdp or fsdp2")
    if (config.get("distillation") or {}).get("enabled", False):
        raise ValueError(
            "distillation.enabled=True cannot be combined with AsyPPO, whose actor loss replaces verl's; disable it"
        )
    check_numbers(config)
    check_choices(config)
    _check_loss_mode(config.actor_rollout_ref.actor.policy_loss.get("loss_mode", "vanilla"), asyppo)
    check_placement(config, asyppo)
    if mode == "separate_async":
        _check_separate_async(config)
    n = config.actor_rollout_ref.rollout.n
    if asyppo.shard == "group" and n < asyppo.num_critics:
        raise ValueError(
            f"actor_rollout_ref.rollout.n={n} is below asyppo.num_critics={asyppo.num_critics}: every mini-critic needs a "
            "response of every prompt; raise n or lower num_critics"
        )


def trainer_mode(config: Any) -> str:
    """The mode as verl calls it, before and after :func:`asyppo_verl.preflight.prepare`."""
    return str(config.trainer.v1.trainer_mode).removeprefix(TRAINER_PREFIX)


def _check_loss_mode(loss_mode: str, asyppo: AsyPPOConfig) -> None:
    if loss_mode == "dro" and asyppo.adv_mask_fraction > 0:
        raise ValueError(
            "actor_rollout_ref.actor.policy_loss.loss_mode='dro' moves tokens whose advantage is 0, so the advantage mask "
            "would not hold; choose another loss_mode or set asyppo.adv_mask_fraction=0"
        )


def _check_separate_async(config: Any) -> None:
    """What verl asserts when its trainer starts, long after Ray has."""
    rollout, reward_model = config.actor_rollout_ref.rollout, config.reward.reward_model
    batch, mini_batch = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    steps = config.trainer.v1.separate_async.parameter_sync_step
    if not is_count(steps) or batch != steps * mini_batch:
        raise ValueError(
            f"data.train_batch_size={batch} is not trainer.v1.separate_async.parameter_sync_step={steps!r} * "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={mini_batch}, which trainer_mode=separate_async needs; "
            f"set data.train_batch_size={steps * mini_batch if is_count(steps) else mini_batch}"
            + ("" if is_count(steps) else " and parameter_sync_step=1")
        )
    for key in ("nnodes", "n_gpus_per_node"):
        if not is_count(rollout[key]):
            raise ValueError(
                f"actor_rollout_ref.rollout.{key}={rollout[key]!r}: trainer_mode=separate_async generates on GPUs of its own; "
                "set it to 1 or more"
            )
    if rollout.checkpoint_engine.backend == "naive":
        raise ValueError(
            "actor_rollout_ref.rollout.checkpoint_engine.backend='naive' cannot carry weights to the separate rollout of "
            "trainer_mode=separate_async; set nccl, or another of verl's"
        )
    if reward_model.enable and not reward_model.enable_resource_pool:
        raise ValueError(
            "reward.reward_model.enable_resource_pool=False: with trainer_mode=separate_async a reward model needs GPUs of "
            "its own; set it to True, with reward.reward_model.nnodes and n_gpus_per_node"
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

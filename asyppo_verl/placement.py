"""How many GPUs each mini-critic has under a placement, and which numbers of them go together with the rest of a run.

It reads the configuration and nothing else; the arithmetic is of whole numbers.
"""

from collections.abc import Iterable
from typing import Any

from asyppo_verl.config import TRAINER_PREFIX, AsyPPOConfig
from asyppo_verl.preflight.quantities import is_count, is_number


def critic_ranks(config: Any, asyppo: AsyPPOConfig) -> int:
    """Ranks that one mini-critic spans; under "split" its share of the pool."""
    if not asyppo.critics_are_apart:
        return config.trainer.n_gpus_per_node * config.trainer.nnodes
    return asyppo.pool.ranks // (asyppo.num_critics if asyppo.placement == "split" else 1)


def ranks_key(asyppo: AsyPPOConfig) -> str:
    """The settings that say how many ranks a mini-critic has, for a message."""
    if not asyppo.critics_are_apart:
        return "trainer.nnodes * trainer.n_gpus_per_node"
    share = f" / asyppo.num_critics={asyppo.num_critics}" if asyppo.placement == "split" else ""
    return f"asyppo.pool.nnodes={asyppo.pool.nnodes} * asyppo.pool.n_gpus_per_node={asyppo.pool.n_gpus_per_node}{share}"


def check_placement(config: Any, asyppo: AsyPPOConfig) -> None:
    """Refuse a placement for which the GPUs do not suffice or do not come out even.

    Raises:
        ValueError: naming key, value, and numbers that would work.
    """
    placement, pool = asyppo.placement, asyppo.pool
    if not asyppo.critics_are_apart and pool.n_gpus_per_node:
        raise ValueError(
            f"asyppo.pool.n_gpus_per_node={pool.n_gpus_per_node} is idle with asyppo.placement=colocated, under which the "
            "critics use the actor's GPUs; set asyppo.placement to pool or split, or remove asyppo.pool"
        )
    if asyppo.critics_are_apart and not pool.ranks:
        least = asyppo.num_critics if placement == "split" else 1
        raise ValueError(
            f"asyppo.placement={placement} needs GPUs for the critics alone, but asyppo.pool.n_gpus_per_node="
            f"{pool.n_gpus_per_node} * asyppo.pool.nnodes={pool.nnodes} is 0; set asyppo.pool.n_gpus_per_node={least} or "
            f"{'a multiple' if placement == 'split' else 'more'}, and asyppo.pool.nnodes=1"
        )
    if placement == "split" and pool.ranks % asyppo.num_critics:
        raise ValueError(
            f"asyppo.placement=split cannot deal the {pool.ranks} GPUs of asyppo.pool (n_gpus_per_node="
            f"{pool.n_gpus_per_node} * nnodes={pool.nnodes}) to asyppo.num_critics={asyppo.num_critics} evenly; "
            f"{fitting_ranks(config, asyppo, config.critic)} GPUs would do, or asyppo.placement=pool"
        )
    _check_sequence_parallel(config, asyppo)
    _check_total(config, asyppo)


def fitting_ranks(config: Any, asyppo: AsyPPOConfig, critic: Any) -> str:
    """Numbers of GPUs on which ``critic`` could cut its mini-batches evenly, as text for a message."""
    sequence_parallel = critic.fsdp.ulysses_sequence_parallel_size
    unit = sequence_parallel * (asyppo.num_critics if asyppo.placement == "split" else 1)
    rows = config.critic.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n
    micro_batch = critic.ppo_micro_batch_size_per_gpu
    if asyppo.num_critics == 1 and not critic.use_dynamic_bsz and is_count(micro_batch):
        rows //= micro_batch
    present = asyppo.pool.ranks if asyppo.critics_are_apart else critic_ranks(config, asyppo)
    return _listed(count * unit for count in range(1, max(1, 2 * present // unit) + 1) if rows % count == 0)


def check_sharding(key: str, size: int, strategy: tuple[str, str], ranks: int, place: str) -> None:
    """Refuse a size of FSDP's sharding groups with which the GPUs do not come out even, or do not train together.

    Args:
        key, size: the setting and its value, negative for all GPUs.
        strategy: the setting that chooses FSDP's version, and its value.
        ranks: the GPUs that there are.
        place: whose they are, for a message.

    Raises:
        ValueError: naming key, value, and numbers that would work.
    """
    if 0 <= size < ranks and (size == 0 or ranks % size):
        raise ValueError(
            f"{key}={size} does not divide the {ranks} GPUs {place}; set one of "
            f"{_listed(_divisors(ranks))} (1: a whole copy on every GPU), or -1 for all of them"
        )
    if strategy[1] == "fsdp" and size == 1 < ranks:
        # torch's FSDP1 takes ranks in groups of one for alone, and never averages their gradients.
        raise ValueError(
            f"{key}=1 with {strategy[0]}=fsdp: each of the {ranks} GPUs {place} would train a copy of its own that is "
            f"never averaged with the others; set {strategy[0]}=fsdp2, or {key}=-1"
        )


def check_actor_sharding(actor: Any, ranks: int) -> None:
    """The same for verl's ``actor`` node, which shares the cause."""
    prefix = "actor_rollout_ref.actor"
    strategy, place = (f"{prefix}.strategy", actor.strategy), "of trainer.nnodes * trainer.n_gpus_per_node"
    check_sharding(f"{prefix}.fsdp_config.fsdp_size", actor.fsdp_config.fsdp_size, strategy, ranks, place)


def _check_sequence_parallel(config: Any, asyppo: AsyPPOConfig) -> None:
    ranks, size = critic_ranks(config, asyppo), config.critic.fsdp.ulysses_sequence_parallel_size
    if ranks % size:
        raise ValueError(
            f"critic.fsdp.ulysses_sequence_parallel_size={size} does not divide the {ranks} GPUs that a critic "
            f"has ({ranks_key(asyppo)}); set one of {_listed(_divisors(ranks))}"
        )


def _check_total(config: Any, asyppo: AsyPPOConfig) -> None:
    """Compare what is needed with the GPUs that Ray is told to start with, where it is told."""
    present = config.get("ray_kwargs", {}).get("ray_init", {}).get("num_gpus")
    if not asyppo.critics_are_apart or present is None:
        return
    if not is_number(present):
        raise ValueError(
            f"ray_kwargs.ray_init.num_gpus={present!r} must be a number; remove it to let Ray count the GPUs"
        )
    needed = {
        "trainer": config.trainer.n_gpus_per_node * config.trainer.nnodes,
        "asyppo.pool": asyppo.pool.ranks,
    }
    if config.trainer.v1.trainer_mode.removeprefix(TRAINER_PREFIX) == "separate_async":
        rollout = config.actor_rollout_ref.rollout
        needed["actor_rollout_ref.rollout"] = rollout.n_gpus_per_node * rollout.nnodes
    reward_model = config.reward.reward_model
    if reward_model.enable_resource_pool:
        needed["reward.reward_model"] = reward_model.n_gpus_per_node * reward_model.nnodes
    total = sum(needed.values())
    if total > present:
        raise ValueError(
            f"ray_kwargs.ray_init.num_gpus={present}, but asyppo.placement={asyppo.placement} needs {total}: "
            + " + ".join(f"{count} ({key})" for key, count in needed.items())
            + f"; raise it to {total}, or lower one of them"
        )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _listed(numbers: Iterable[int]) -> str:
    """The last few, which are the nearest to what was asked for and beyond."""
    *rest, last = list(numbers)[-4:]
    return f"{', '.join(map(str, rest))} or {last}" if rest else str(last)

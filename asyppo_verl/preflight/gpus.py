"""GPUs and logical CPUs: who gets how many, and which numbers of them go together with the rest of a run."""

import os
from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from ray._private.utils import get_num_cpus

from asyppo_verl.config import AsyPPOConfig, is_asyppo, trainer_mode
from asyppo_verl.critic_settings import Run


def critic_ranks(run: Run) -> int:
    """Ranks that one mini-critic spans; under "split" its share of the pool."""
    asyppo, trainer = run.asyppo, run.config.trainer
    if not asyppo.critics_are_apart:
        return trainer.n_gpus_per_node * trainer.nnodes
    return asyppo.pool.ranks // (asyppo.num_critics if asyppo.placement == "split" else 1)


def ranks_key(asyppo: AsyPPOConfig) -> str:
    """The settings that say how many ranks a mini-critic has, for a message."""
    if not asyppo.critics_are_apart:
        return "trainer.nnodes * trainer.n_gpus_per_node"
    share = f" / asyppo.num_critics={asyppo.num_critics}" if asyppo.placement == "split" else ""
    return f"asyppo.pool.nnodes={asyppo.pool.nnodes} * asyppo.pool.n_gpus_per_node={asyppo.pool.n_gpus_per_node}{share}"


def check_placement(run: Run) -> None:
    """Refuse a placement for which the critics' GPUs do not suffice or do not come out even."""
    asyppo, placement, pool = run.asyppo, run.asyppo.placement, run.asyppo.pool
    least = f"{asyppo.num_critics} or a multiple" if placement == "split" else "1 or more"
    gpus = f"asyppo.pool.n_gpus_per_node={pool.n_gpus_per_node} * asyppo.pool.nnodes={pool.nnodes}"
    if not asyppo.critics_are_apart and pool.n_gpus_per_node:
        raise ValueError(
            f"{gpus}: idle with asyppo.placement=colocated, under which the critics use the actor's GPUs; set "
            "asyppo.placement to pool or split, or remove asyppo.pool"
        )
    if asyppo.critics_are_apart and not pool.ranks:
        raise ValueError(
            f"asyppo.placement={placement} needs GPUs for the critics alone, but {gpus} is 0; set "
            f"asyppo.pool.n_gpus_per_node={least}, and asyppo.pool.nnodes=1"
        )
    if placement == "split" and pool.ranks % asyppo.num_critics:
        raise ValueError(
            f"asyppo.placement=split cannot deal the {pool.ranks} GPUs of {gpus} to asyppo.num_critics={asyppo.num_critics} "
            f"evenly; take a multiple of {asyppo.num_critics}, or asyppo.placement=pool"
        )


def check_sharding(run: Run) -> None:
    """Refuse sizes of FSDP's sharding groups, critic or actor, with which the GPUs do not come out even or train apart."""
    trainer, critic = run.config.trainer, f"critic {run.critics[0]}" if run.own else "a critic"
    actors = trainer.nnodes * trainer.n_gpus_per_node, "of trainer.nnodes * trainer.n_gpus_per_node"
    critics = critic_ranks(run), f"that {critic} has ({ranks_key(run.asyppo)})"
    actor = "actor_rollout_ref.actor"
    for size_key, strategy_key, (ranks, place) in (
        (f"{actor}.fsdp_config.fsdp_size", f"{actor}.strategy", actors),
        ("critic.fsdp.fsdp_size", "critic.strategy", critics),
    ):
        size, strategy, key = run.get(size_key), run.get(strategy_key), run.key(size_key)
        if strategy not in ("fsdp", "fsdp2") or not isinstance(size, int):
            continue
        if 0 <= size < ranks and (size == 0 or ranks % size):
            raise ValueError(
                f"{key}={size} does not divide the {ranks} GPUs {place}; set one of {_listed(_divisors(ranks))} (1: all of "
                "the model on every GPU), or -1 for all of them"
            )
        if strategy == "fsdp" and size == 1 < ranks:
            # torch's FSDP1 takes ranks in groups of one for alone, and never averages their gradients.
            raise ValueError(
                f"{key}=1 with {strategy_key}=fsdp: each of the {ranks} GPUs {place} would train a copy of its own that is "
                f"never averaged with the others; set {strategy_key}=fsdp2, or {key}=-1"
            )


def check_sequence_parallel(run: Run) -> None:
    """Refuse sequence parallelism of critics that the GPUs cannot divide, or outside flash attention.

    verl exchanges a sequence's parts between ranks only there; with any other attention a rank would see its part alone.
    """
    size, ranks = run.config.critic.fsdp.ulysses_sequence_parallel_size, critic_ranks(run)
    asked = f"critic.fsdp.ulysses_sequence_parallel_size={size}"
    if ranks % size:
        raise ValueError(
            f"{asked} does not divide the {ranks} GPUs that a critic has ({ranks_key(run.asyppo)}); set one of "
            f"{_listed(_divisors(ranks))}"
        )
    override = run.get("critic.model.override_config") or {}
    for key in ("attn_implementation", "_attn_implementation"):
        if size > 1 and "flash" not in (override.get(key) or "flash_attention_2"):
            raise ValueError(
                f"{asked} with {run.key(f'critic.model.override_config.{key}')}={override[key]!r}: every rank would attend "
                "to its own part of a sequence only; remove one of the two settings"
            )
    if size > 1 and not run.get("critic.model.use_remove_padding"):
        raise ValueError(
            f"{asked} needs {run.key('critic.model.use_remove_padding')}=True: set it, or set the size to 1"
        )


def needed_cpus(config: DictConfig) -> dict[str, int]:
    """Logical CPUs that Ray must have for verl's trainers to start: what for, and how many.

    Placement groups keep three for each GPU (verl's ``ResourcePoolManager``; two where rollout has GPUs of its own), and
    TransferQueue's actors and verl's remote reward workers one each. Other actors keep none.
    """
    rollout, reward, queue = config.actor_rollout_ref.rollout, config.reward, config.transfer_queue.backend
    pools = {"trainer": config.trainer}
    if is_asyppo(config):
        pools["asyppo.pool"] = (config.get("asyppo") or {}).get("pool") or {}
    if reward.reward_model.enable_resource_pool:
        pools["reward.reward_model"] = reward.reward_model
    needed = {
        f"GPUs of {name} x 3": 3 * pool.get("nnodes", 1) * pool.get("n_gpus_per_node", 0)
        for name, pool in pools.items()
    }
    if trainer_mode(config) == "separate_async":
        needed["GPUs of actor_rollout_ref.rollout x 2"] = 2 * rollout.nnodes * rollout.n_gpus_per_node
    needed["TransferQueue's controller"] = 1
    if queue.storage_backend == "SimpleStorage":
        needed["transfer_queue.backend.SimpleStorage.num_data_storage_units"] = (
            queue.SimpleStorage.num_data_storage_units
        )
    if reward.reward_manager.name == "remote":
        needed["reward.num_workers ** 2"] = reward.num_workers**2
    return {name: count for name, count in needed.items() if count}


def ray_address(config: DictConfig) -> str | None:
    """The Ray cluster that the run is told to join; None if it is not, "local" for one of its own."""
    return OmegaConf.select(config, "ray_kwargs.ray_init.address") or os.environ.get("RAY_ADDRESS")


def is_on_this_machine(config: DictConfig) -> bool:
    """True if the run is told of no other machine, so that its workers read and write the driver's files."""
    return config.trainer.nnodes == 1 and ray_address(config) in (None, "local")


def check_cpus(run: Run) -> None:
    """Refuse a cluster of the run's own with so few logical CPUs that verl would wait for more for ever."""
    if missing := missing_cpus(run.config):
        raise ValueError(missing)


def missing_cpus(config: DictConfig) -> str:
    """What is wrong with the logical CPUs of a run of any estimator, key, value and fix; empty if there are enough.

    A cluster that exists already, as one of several nodes does, is not looked at: it knows its CPUs, and can grow.
    """
    settings, address = OmegaConf.select(config, "ray_kwargs.ray_init") or {}, ray_address(config)
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    running = Path(folder, "ray", "ray_current_cluster")  # what Ray joins unless told
    is_own = address == "local" or (address is None and config.trainer.nnodes == 1 and not running.exists())
    if not is_own:
        return ""
    needed, given = needed_cpus(config), settings.get("num_cpus")
    total, present = sum(needed.values()), get_num_cpus(True) if given is None else given
    if not isinstance(present, int | float) or present >= total:
        return ""
    return (
        f"ray_kwargs.ray_init.num_cpus={given}"
        + ("" if given is not None else f" (the {present} cores of this machine)")
        + f" is below the {total} logical CPUs without which verl hangs: "
        + " + ".join(f"{count} ({name})" for name, count in needed.items())
        + f"; set ray_kwargs.ray_init.num_cpus={total}, which may be more than there are cores"
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _listed(numbers: Iterable[int]) -> str:
    """The largest four, for a message."""
    *rest, last = list(numbers)[-4:]
    return f"{', '.join(map(str, rest))} or {last}" if rest else str(last)

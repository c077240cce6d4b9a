"""The mini-critics: M value models behind verl's one critic role, each a verl ``TrainingWorker`` of its own."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import verl.utils.model
from omegaconf import DictConfig
from tensordict import TensorDict
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.profiler import DistProfiler, DistProfilerExtension
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.padding import response_from_nested

from asyppo_verl import value_model

CRITIC_ID = "asyppo_critic_id"
"""Batch-level field: the mini-critic that a training call is for."""


VALUE_PREFIX = "asyppo_values_"
"""How the names of the fields with the single critics' values begin."""


def value_field(index: int) -> str:
    """Name of the batch field with the values of mini-critic ``index`` on response positions."""
    return f"{VALUE_PREFIX}{index}"


@dataclasses.dataclass(frozen=True)
class MiniCriticSpec:
    """How one mini-critic is built."""

    worker: TrainingWorkerConfig
    """Model, engine, optimizer and checkpoint settings, as verl's critic has them."""
    head_seed: int
    """Seed of the new value head."""


def critic_spec(node: DictConfig, head_seed: int) -> MiniCriticSpec:
    """Turn a verl ``critic`` node into a worker configuration that honours all of its batching keys.

    verl's V1 trainer ignores ``use_dynamic_bsz``, ``ppo_micro_batch_size_per_gpu`` and ``ppo_max_token_len_per_gpu`` of
    the critic and trains with the inference budget (verl issue 7462).
    """
    critic = omega_conf_to_dataclass(node)
    engine = critic.engine
    engine.use_dynamic_bsz = critic.use_dynamic_bsz
    engine.max_token_len_per_gpu = critic.ppo_max_token_len_per_gpu
    engine.infer_max_token_len_per_gpu = (
        node.get("ppo_infer_max_token_len_per_gpu") or critic.forward_max_token_len_per_gpu
    )
    engine.micro_batch_size_per_gpu = critic.ppo_micro_batch_size_per_gpu
    engine.infer_micro_batch_size_per_gpu = (
        critic.ppo_infer_micro_batch_size_per_gpu or critic.forward_micro_batch_size_per_gpu
    )
    profiler = node.get("profiler")
    worker = TrainingWorkerConfig(
        model_type="value_model",
        model_config=critic.model,
        engine_config=engine,
        optimizer_config=critic.optim,
        checkpoint_config=critic.checkpoint,
        profiler_config=omega_conf_to_dataclass(profiler) if profiler else None,
    )
    return MiniCriticSpec(worker, head_seed)


def ensemble_worker_class(specs: Sequence[MiniCriticSpec]) -> type["MiniCriticEnsembleWorker"]:
    """A worker class that carries its specs: verl hands a critic worker one configuration, and we need M.

    Made anew at every call, so that Ray ships it by value; attributes set on an importable class would be lost.
    """
    return type("MiniCriticEnsembleWorker", (MiniCriticEnsembleWorker,), {"specs": tuple(specs)})


_TRAIN = make_nd_compute_dataproto_dispatch_fn(mesh_name="train")


class MiniCriticEnsembleWorker(Worker, DistProfilerExtension):
    """One rank of all mini-critics.

    It has the methods that verl's trainer calls on its critic. Each mini-critic spans all ranks of the role's pool and
    has its own FSDP engine, optimizer, scheduler and checkpoint folder; with ``critic.fsdp.param_offload`` only the one at
    work is on the accelerator.
    """

    specs: tuple[MiniCriticSpec, ...] = ()

    def __init__(self, config: Any = None) -> None:
        Worker.__init__(self)
        DistProfilerExtension.__init__(self, DistProfiler(rank=self.rank, config=None, tool_config=None))
        value_model.install(verl.utils.model)
        self.critics = [TrainingWorker(spec.worker) for spec in self.specs]
        self.set_dispatch_collect(mesh_name="train", **self.critics[0].get_dispatch_collect())

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reset(self) -> None:
        """Build every model; the new heads differ between critics and agree between ranks and runs."""
        for critic, spec in zip(self.critics, self.specs, strict=True):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(spec.head_seed)
                critic.reset()
            _name_architecture(critic.engine.module)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_loss_fn(self, loss_fn: Callable) -> None:
        """Give every critic verl's value loss; each normalises and clips on its own data."""
        for critic in self.critics:
            critic.set_loss_fn(loss_fn)

    @register(dispatch_mode=_TRAIN, blocking=False)
    def infer_batch(self, data: TensorDict) -> TensorDict | None:
        """Every critic evaluates the whole batch.

        Returns:
            A field per critic (:func:`value_field`), jagged (B, T) on response positions; None on ranks that verl does not
            collect from.
        """
        values = {}
        for index, critic in enumerate(self.critics):
            # A copy each: a worker leaves its engine's settings in the batch, and the next critic may have others.
            output = critic.infer_batch(data.copy())
            if output is not None:
                values[value_field(index)] = response_from_nested(output["values"], data["response_mask"])
        return tu.get_tensordict(values, {"metrics": {}}) if values else None

    @register(dispatch_mode=_TRAIN, blocking=False)
    def train_mini_batch(self, data: TensorDict) -> TensorDict | None:
        """Train the one critic named by the batch-level field :data:`CRITIC_ID` on this batch, around its own values."""
        index = tu.pop(data, CRITIC_ID)
        data["values"] = data.pop(value_field(index))
        return self.critics[index].train_mini_batch(data)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, global_step: int = 0, max_ckpt_to_keep: int | None = None
    ) -> None:
        """Save every critic into ``critic_<m>`` below the given folders."""
        for folder, remote, critic in self._folders(local_path, hdfs_path):
            critic.save_checkpoint(folder, remote, global_step, max_ckpt_to_keep)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = False
    ) -> None:
        """Load every critic from ``critic_<m>``.

        Raises:
            ValueError: if the folders are not those of exactly M mini-critics, before anything is loaded.
        """
        check_checkpoint(local_path, len(self.critics))
        for folder, remote, critic in self._folders(local_path, hdfs_path):
            critic.load_checkpoint(folder, remote, del_local_after_load)

    def _folders(self, local_path: str, hdfs_path: str | None) -> list[tuple[str, str | None, TrainingWorker]]:
        return [
            (os.path.join(local_path, name), hdfs_path and os.path.join(hdfs_path, name), critic)
            for name, critic in zip(critic_folders(len(self.critics)), self.critics, strict=True)
        ]


def critic_folders(num_critics: int) -> list[str]:
    """Names of the mini-critics' folders in a checkpoint."""
    return [f"critic_{index}" for index in range(num_critics)]


def check_checkpoint(path: str, num_critics: int) -> None:
    """Raises ValueError unless ``path`` holds the folders of exactly ``num_critics`` mini-critics."""
    found = {name for name in (os.listdir(path) if os.path.isdir(path) else []) if name.startswith("critic_")}
    expected = set(critic_folders(num_critics))
    if found != expected:
        raise ValueError(
            f"the checkpoint {path} does not fit asyppo.num_critics={num_critics}: "
            f"missing {sorted(expected - found) or 'nothing'}, unexpected {sorted(found - expected) or 'nothing'}; "
            "set num_critics to what the run was saved with, or trainer.resume_mode=disable to start anew"
        )


def _name_architecture(module: Any) -> None:
    """Name the class that a checkpoint really holds; it would else say the causal model it was started from."""
    module = getattr(module, "_fsdp_wrapped_module", module)  # FSDP1 wraps, FSDP2 renames the class
    module.config.architectures = [type(module).__name__.removeprefix("FSDP")]

"""The mini-critics: M value models behind verl's one critic role, each a verl ``TrainingWorker`` of its own."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import verl.utils.model
from omegaconf import DictConfig
from tensordict import TensorDict
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.single_controller.ray import RayWorkerGroup
from verl.trainer.ppo.utils import Role
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_device_name, get_nccl_backend
from verl.utils.metric import AggregationType, Metric
from verl.utils.profiler import DistProfilerExtension
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.padding import response_from_nested

from asyppo_verl import packed_attention, value_model
from asyppo_verl.checkpoint import Model, check_critics, check_files, critic_folders

CRITIC_ID = "asyppo_critic_id"
"""Batch-level field: the mini-critic that a training call is for."""

RESPONSES = "asyppo_responses"
"""Batch-level field of a training call: numbers of rows per step and rank that are responses, before fillers; or None."""

MESH = "train"
"""verl's name for the data-parallel layout of a critic's ranks."""

VALUE_PREFIX = "asyppo_values_"
"""Prefix of the fields with the single critics' values."""


def value_field(index: int) -> str:
    """Name of the batch field with the values of mini-critic ``index`` on response positions."""
    return f"{VALUE_PREFIX}{index}"


def worker_configs(nodes: Sequence[DictConfig]) -> list[TrainingWorkerConfig]:
    """The mini-critics' settings from verl ``critic`` nodes.

    Critics with the same node share one configuration, and those with the same tokenizer share that.
    """
    workers: dict[int, TrainingWorkerConfig] = {}
    first_of: dict[str, Any] = {}
    for node in nodes:
        if id(node) not in workers:
            workers[id(node)] = worker_config(node)
            # Ray ships a worker class of at most 100 MB, and a tokenizer takes 10 to 30.
            model = workers[id(node)].model_config
            first = first_of.setdefault(model.tokenizer_path, model)
            model.tokenizer, model.processor = first.tokenizer, first.processor
    return [workers[id(node)] for node in nodes]


def worker_config(node: DictConfig) -> TrainingWorkerConfig:
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
    return TrainingWorkerConfig(
        model_type="value_model",
        model_config=critic.model,
        engine_config=engine,
        optimizer_config=critic.optim,
        checkpoint_config=critic.checkpoint,
        profiler_config=omega_conf_to_dataclass(profiler) if profiler else None,
    )


def ensemble_worker_class(
    workers: Sequence[TrainingWorkerConfig], *, head_seed: int, split: bool = False, compiles: bool = False
) -> type["MiniCriticEnsembleWorker"]:
    """A worker class that carries its settings: verl hands a critic worker one configuration, and we need M.

    Made anew at every call, so that Ray ships it by value; attributes set on an importable class would be lost.

    Args:
        workers: one per mini-critic.
        head_seed: of the first new value head; the next has the next.
        split: the ranks are dealt to the critics in equal runs, instead of every critic spanning all of them.
        compiles: the critics' layers are compiled.
    """
    subgroups = len(workers) if split else 1
    own = {"workers": tuple(workers), "head_seed": head_seed, "subgroups": subgroups, "compiles": compiles}
    return type("MiniCriticEnsembleWorker", (MiniCriticEnsembleWorker,), own)


def worker_subgroups(group: RayWorkerGroup, subgroups: int) -> list[RayWorkerGroup]:
    """The runs of ranks that :func:`ensemble_worker_class` deals to the critics, each as a worker group of its own."""
    role, size = str(Role.Critic), group.world_size // subgroups
    return [
        group.from_detached(
            worker_names=group.worker_names[start : start + size],
            worker_handles=group.workers[start : start + size],
            ray_cls_with_init=group.ray_cls_with_init,
        ).spawn({role})[role]
        for start in range(0, group.world_size, size)
    ]


class MiniCritic(TrainingWorker):
    """verl's worker with a value head in float32, and with fillers kept out of normalisers and of shuffling."""

    _step_sizes: Iterator[int] | None = None

    def reset(self) -> None:
        """Build the model, its head in float32; it looks once for the bounds of packed sequences."""
        super().reset()
        module, engine = self.engine.module, self.engine_config
        value_model.use_float32_head(module)
        is_whole = engine.ulysses_sequence_parallel_size == 1  # otherwise a rank sees a part of each sequence
        if engine.use_remove_padding and is_whole and packed_attention.wants_bounds(module):
            packed_attention.find_bounds_once(module)

    def train(self, data: TensorDict, responses: Sequence[Sequence[int]]) -> TensorDict | None:
        """verl's ``train_mini_batch`` on rows of which ``responses[i][r]`` of rank r in step i are no fillers."""
        self._step_sizes = itertools.cycle(map(sum, responses))
        rank, loader = self.engine.get_data_parallel_rank(), tu.pop(data, "dataloader_kwargs")
        if loader.pop("shuffle"):
            rows_per_step = len(data) // len(responses)
            seed = tu.get(data, "seed") + rank
            loader["sampler"] = ShuffledResponses([step[rank] for step in responses], rows_per_step, seed)
        tu.assign_non_tensor_data(data, "dataloader_kwargs", loader)
        try:
            return self.train_mini_batch(data)
        finally:
            self._step_sizes = None

    def train_batch(self, data: TensorDict) -> TensorDict | None:
        """Make one optimizer step, of which the seq-mean modes divide by the number of responses."""
        if self._step_sizes is not None:
            tu.assign_non_tensor_data(data, "global_batch_size", next(self._step_sizes))
        return super().train_batch(data)


@dataclasses.dataclass(frozen=True)
class TokenMeans:
    """verl's value loss, with means over the response tokens of an optimizer step beside it.

    verl takes means of micro-batches, to which one of fillers adds a 0: that would depend on the number of ranks.
    """

    loss_fn: Callable

    def __call__(self, model_output: dict, data: TensorDict, dp_group: Any = None) -> tuple[torch.Tensor, dict]:
        loss, metrics = self.loss_fn(model_output=model_output, data=data, dp_group=dp_group)
        # A SUM is one over micro-batches of the mean over ranks.
        share = data["response_mask"].values().sum().item() * data["dp_size"] / max(1, data["batch_num_tokens"])
        for name in ("critic/vf_clipfrac", "critic/vpred_mean"):
            metrics[name] = Metric(AggregationType.SUM, metrics[name] * share)
        return loss, metrics


class ShuffledResponses:
    """Row numbers of one rank, in which the responses change places in every pass and the fillers keep theirs."""

    def __init__(self, responses: Sequence[int], rows_per_step: int, seed: int) -> None:
        self._is_response = torch.arange(rows_per_step) < torch.tensor(responses)[:, None]
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self._is_response.numel()

    def __iter__(self) -> Iterator[int]:
        rows = torch.arange(len(self)).view_as(self._is_response)
        responses = rows[self._is_response]
        rows[self._is_response] = responses[torch.randperm(len(responses), generator=self._generator)]
        return iter(rows.flatten().tolist())


_TRAIN = make_nd_compute_dataproto_dispatch_fn(mesh_name=MESH)


class MiniCriticEnsembleWorker(Worker, DistProfilerExtension):
    """One rank of all mini-critics.

    It has the methods that verl's trainer calls on its critic. Each mini-critic has its own FSDP engine, optimizer,
    scheduler and checkpoint folder, and spans all ranks of the role's pool, or its subgroup of them; with
    ``critic.fsdp.param_offload`` only the one at work is on the accelerator.
    """

    workers: tuple[TrainingWorkerConfig, ...] = ()
    head_seed: int = 0
    subgroups: int = 1
    """Into how many equal runs the ranks are dealt: 1, or one per critic."""
    compiles: bool = False
    """Whether the critics' layers are compiled."""

    def __init__(self, config: Any = None) -> None:
        Worker.__init__(self)
        value_model.install(verl.utils.model)
        is_split = self.subgroups > 1
        held = [_join_subgroup(self.rank, self.world_size, self.subgroups)] if is_split else range(len(self.workers))
        # One critic is verl's, to the last bit.
        critic = MiniCritic if len(self.workers) > 1 else TrainingWorker
        self.critics = {index: critic(self.workers[index]) for index in held}
        self.set_dispatch_collect(mesh_name=MESH, **self.critics[held[0]].get_dispatch_collect())
        # A process has one profiler: what verl starts and stops is what the critics' own steps are noted in.
        DistProfilerExtension.__init__(self, self.critics[held[0]].profiler)
        for critic in self.critics.values():
            critic.profiler = self.profiler

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reset(self) -> None:
        """Build every model; the new heads differ between critics and agree between ranks and runs."""
        for index, critic in self.critics.items():
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.head_seed + index)
                critic.reset()
            if self.compiles:
                value_model.compile_layers(critic.engine.module)
            _name_architecture(critic.engine.module)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_loss_fn(self, loss_fn: Callable) -> None:
        """Give every critic verl's value loss; each normalises and clips on its own data."""
        for critic in self.critics.values():
            critic.set_loss_fn(TokenMeans(loss_fn) if isinstance(critic, MiniCritic) else loss_fn)

    @register(dispatch_mode=_TRAIN, blocking=False)
    def infer_batch(self, data: TensorDict) -> TensorDict | None:
        """Let every critic of this rank evaluate the batch.

        Returns:
            A field per critic (:func:`value_field`), jagged (B, T) on response positions; None on ranks that verl does not
            collect from.
        """
        values = {}
        for index, critic in self.critics.items():
            # A copy each: a worker leaves its engine's settings in the batch, and the next critic may have others.
            output = critic.infer_batch(data.copy())
            if output is not None:
                values[value_field(index)] = response_from_nested(output["values"], data["loss_mask"])
        return tu.get_tensordict(values, {"metrics": {}}) if values else None

    @register(dispatch_mode=_TRAIN, blocking=False)
    def train_mini_batch(self, data: TensorDict) -> TensorDict | None:
        """Train the one critic named by the batch-level field :data:`CRITIC_ID` on this batch, around its own values."""
        index, responses = tu.pop(data, CRITIC_ID), tu.pop(data, RESPONSES)
        data["values"] = data.pop(value_field(index))
        critic = self.critics[index]
        return critic.train_mini_batch(data) if responses is None else critic.train(data, responses)

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
            ValueError: if the folders do not fit this run's critics and this rank, before anything is loaded.
        """
        check_critics(Path(local_path), len(self.workers), held=self.critics)
        ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        for folder, _, critic in self._folders(local_path, None):
            contents = critic.checkpoint_config and critic.checkpoint_config.load_contents
            check_files(Model(Path(folder), ranks, contents), [rank])
        for folder, remote, critic in self._folders(local_path, hdfs_path):
            critic.load_checkpoint(folder, remote, del_local_after_load)

    def _folders(self, local_path: str, hdfs_path: str | None) -> list[tuple[str, str | None, TrainingWorker]]:
        names = critic_folders(len(self.workers))
        return [
            (os.path.join(local_path, names[index]), hdfs_path and os.path.join(hdfs_path, names[index]), critic)
            for index, critic in self.critics.items()
        ]


def _join_subgroup(rank: int, world_size: int, subgroups: int) -> int:
    """Make the process group of this rank's subgroup torch's default, so that FSDP never looks beyond it.

    The subgroups meet at the address that verl gives the worker group.

    Returns:
        The index of the subgroup.
    """
    size = world_size // subgroups
    subgroup, rank_in_subgroup = divmod(rank, size)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(address, port, is_master=rank == 0, wait_for_workers=False)
    torch.distributed.init_process_group(
        backend=f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}",
        store=torch.distributed.PrefixStore(f"subgroup_{subgroup}", store),
        rank=rank_in_subgroup,
        world_size=size,
    )
    return subgroup


def _name_architecture(module: Any) -> None:
    """Name the class that a checkpoint really holds; otherwise it would name the initial causal model."""
    module = getattr(module, "_fsdp_wrapped_module", module)  # FSDP1 wraps, FSDP2 renames the class
    module.config.architectures = [type(module).__name__.removeprefix("FSDP")]

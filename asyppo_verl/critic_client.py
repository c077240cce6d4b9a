"""The driver's calls to the mini-critics: rows, fields and ranks of each, and its answer.

Calls are started and finished apart, so that critics with GPUs of their own can work while the actor does.
"""

import itertools
import math
from typing import Any

import ray
import torch
from omegaconf import DictConfig, OmegaConf
from transfer_queue import KVBatchMeta
from verl.single_controller.ray import RayWorkerGroup
from verl.utils.metric import reduce_metrics
from verl.utils.py_functional import rename_dict
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions
from verl.utils.torch_dtypes import PrecisionType

from asyppo_verl import batch_checks, batch_io, mini_batches
from asyppo_verl.config import AsyPPOConfig
from asyppo_verl.critic_settings import critic_nodes
from asyppo_verl.critic_worker import CRITIC_ID, MESH, RESPONSES, value_field, worker_subgroups

LOGGED_PER_CRITIC = ("vf_loss", "vf_clipfrac", "grad_norm", "lr")


class CriticClient:
    """Evaluates and trains the mini-critics behind verl's one critic worker group; one call of a kind at a time."""

    def __init__(self, group: RayWorkerGroup, config: DictConfig, asyppo: AsyPPOConfig, eos_token_id: int) -> None:
        self._config, self._asyppo, self._eos_token_id = config, asyppo, eos_token_id
        self._all = group
        is_split = asyppo.placement == "split" and asyppo.num_critics > 1
        self._groups = worker_subgroups(group, asyppo.num_critics) if is_split else [group] * asyppo.num_critics
        self._ranks = self._groups[0].world_size // config.critic.fsdp.ulysses_sequence_parallel_size
        """Data-parallel ranks of one critic."""
        for one in {self._all, *self._groups}:
            # verl asks the ranks at their first call, and would then wait for that very call to end.
            one._collect_info[MESH] = one._query_collect_info(MESH)
        nodes = critic_nodes(config, asyppo)
        self._micro_batches = [1 if node.use_dynamic_bsz else node.ppo_micro_batch_size_per_gpu for node in nodes]
        dtypes = [OmegaConf.select(node, "fsdp.mixed_precision.param_dtype") for node in nodes]
        self._loss_is_scaled = [PrecisionType.is_fp16(dtype) for dtype in dtypes]
        self._steps_without_update = [0] * asyppo.num_critics
        self._evaluation: Any = None
        self._updates: dict[int, Any] = {}
        self._fillers: KVBatchMeta | None = None

    def start_evaluation(self, batch: KVBatchMeta, actor_ranks: int) -> None:
        """Let every mini-critic evaluate every response; returns at once.

        Args:
            batch: balanced over the data-parallel ranks of the actor.
            actor_ranks: how many those are.
        """
        # Where the critics have as many ranks as the actor, its order is balanced for them too.
        keys = batch.keys if self._ranks == actor_ranks else mini_batches.rank_major(self._dealt(batch, [batch.keys]))
        call = batch_io.select(
            batch,
            keys,
            batch_io.EVALUATION_FIELDS,
            compute_loss=False,
            temperature=self._config.actor_rollout_ref.rollout.temperature,
        )
        self._evaluation = self._all.infer_batch(call)

    def finish_evaluation(self) -> None:
        """Wait until all values are stored, under the names that :func:`value_field` gives."""
        evaluation, self._evaluation = self._evaluation, None
        ray.get(evaluation.futures)

    def start_update(self, batch: KVBatchMeta, shards: list[list[str]], actor_ranks: int) -> None:
        """Train each mini-critic on its shard; one without responses in this batch sits the step out.

        Critics with GPUs of their own are at work when this returns, those on the actor's GPUs are done. All make equally many
        optimizer steps: as many as verl's one critic, where no shard has fewer responses.
        """
        mini_batch = self._config.critic.ppo_mini_batch_size * self._config.actor_rollout_ref.rollout.n
        if self._asyppo.num_critics == 1:
            self._start(0, batch, self._verls_order(batch, mini_batch, actor_ranks), mini_batch)
            return
        count = mini_batches.step_count(len(batch), mini_batch, map(len, shards))
        steps = {index: mini_batches.cut(shard, count) for index, shard in enumerate(shards) if shard}
        sizes = {
            index: self._ranks * mini_batches.rows_per_rank(cut, self._ranks, self._micro_batches[index])
            for index, cut in steps.items()
        }
        gaps = max(sizes[index] * count - len(shards[index]) for index in steps)
        fields = ["returns", *map(value_field, steps)]
        self._fillers = batch_io.add_fillers(batch, gaps, self._eos_token_id, fields)
        is_filler = set(self._fillers.keys).__contains__
        for index, cut in steps.items():
            filler = iter(self._fillers.keys)
            filled = [[*step, *itertools.islice(filler, sizes[index] - len(step))] for step in cut]
            # A rank's fillers stand behind its responses, of which the worker is told the number.
            parts = [[sorted(part, key=is_filler) for part in step] for step in self._dealt(batch, filled)]
            responses = tuple(tuple(sum(not is_filler(key) for key in part) for part in step) for step in parts)
            self._start(index, batch, mini_batches.rank_major(parts), sizes[index], responses)

    def finish_update(self, step: int) -> dict[str, Any]:
        """Wait until all critics are trained; returns the metrics of this step.

        Raises:
            ValueError: if a critic has made no finite update for some steps now.
        """
        updates, self._updates = self._updates, {}
        metrics, of_critic = {}, {}
        for index, update in updates.items():
            answer = rename_dict((update.get() if self._asyppo.critics_are_apart else update)["metrics"], "critic/")
            metrics[f"asyppo/critic_{index}/skipped_updates"] = self._skipped(index, answer["critic/grad_norm"], step)
            of_critic[index] = reduce_metrics(answer)
            for name in LOGGED_PER_CRITIC:
                metrics[f"asyppo/critic_{index}/{name}"] = of_critic[index][f"critic/{name}"]
        if self._fillers is not None:
            batch_io.remove(self._fillers)
            self._fillers = None
        shared: dict[str, Any] = {
            key: [values[key] for values in of_critic.values()] for key in next(iter(of_critic.values()))
        }
        shared["perf/mfu/critic"] = shared.pop("critic/mfu")
        return {**metrics, **reduce_metrics(shared)}

    def _skipped(self, index: int, grad_norms: list[float], step: int) -> int:
        """Count the updates that verl skipped because the gradient was not finite."""
        skipped = sum(not math.isfinite(norm) for norm in grad_norms)
        idle = self._steps_without_update[index] + 1 if skipped == len(grad_norms) else 0
        self._steps_without_update[index] = idle
        batch_checks.check_updates(index, idle, step, self._loss_is_scaled[index])
        return skipped

    def _start(
        self, index: int, batch: KVBatchMeta, keys: list[str], mini_batch_size: int, responses: Any = None
    ) -> None:
        """Start one critic's training call; ``responses[i][r]`` rows of rank r in step i are no fillers (None: all)."""
        critic = self._config.critic
        call = batch_io.select(
            batch,
            keys,
            [*batch_io.TRAINING_FIELDS, value_field(index)],
            **{
                CRITIC_ID: index,
                "global_batch_size": mini_batch_size,
                "mini_batch_size": mini_batch_size,
                "epochs": critic.ppo_epochs,
                "seed": critic.data_loader_seed,
                "dataloader_kwargs": {"shuffle": critic.shuffle},
                "temperature": self._config.actor_rollout_ref.rollout.temperature,
                RESPONSES: responses,
            },
        )
        update = self._groups[index].train_mini_batch(call)
        # One at a time on the actor's workers: they have async methods, so Ray begins calls in any order, on every rank in
        # another, and collectives of two critics would meet.
        self._updates[index] = update if self._asyppo.critics_are_apart else update.get()

    def _verls_order(self, batch: KVBatchMeta, mini_batch: int, actor_ranks: int) -> list[str]:
        """Put all rows in the order in which verl cuts them into the steps of its one critic."""
        if self._ranks == actor_ranks:
            return batch.keys
        # The steps of a critic on the actor's ranks, if their number divides a step.
        steps = mini_batches.mini_batches(batch.keys, mini_batch, ranks=math.gcd(actor_ranks, mini_batch))
        return mini_batches.rank_major(self._dealt(batch, steps))

    def _dealt(self, batch: KVBatchMeta, steps: list[list[str]]) -> list[list[list[str]]]:
        """Deal the keys of every step to the critics' ranks so that these share the work of each step evenly."""
        rows = [batch, self._fillers] if self._fillers is not None else [batch]
        length_of = {key: tag["seq_len"] for one in rows for key, tag in zip(one.keys, one.tags, strict=True)}
        parts = []
        for keys in steps:
            lengths = torch.tensor([length_of[key] for key in keys], dtype=torch.int64)
            workload = calculate_workload(lengths).tolist()
            dealt = get_seqlen_balanced_partitions(workload, k_partitions=self._ranks, equal_size=True)
            parts.append([[keys[i] for i in part] for part in dealt])
        return parts

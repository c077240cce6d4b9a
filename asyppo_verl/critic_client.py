"""The driver's calls to the mini-critics: which rows and fields each gets, on which ranks, and what it answers.

Every call is started and finished apart, so that critics with GPUs of their own can work while the actor does.
"""

import math
from typing import Any

import ray
import torch
from omegaconf import DictConfig
from transfer_queue import KVBatchMeta
from verl.single_controller.ray import RayWorkerGroup
from verl.utils.metric import reduce_metrics
from verl.utils.py_functional import rename_dict
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

from asyppo_verl import batch_io, mini_batches
from asyppo_verl.config import AsyPPOConfig, shard_mini_batch_size
from asyppo_verl.critic_worker import CRITIC_ID, MESH, share_groups, value_field

LOGGED_PER_CRITIC = ("vf_loss", "vf_clipfrac", "grad_norm", "lr")


class CriticClient:
    """Evaluates and trains the mini-critics behind verl's one critic worker group; one call of a kind at a time."""

    def __init__(self, group: RayWorkerGroup, config: DictConfig, asyppo: AsyPPOConfig) -> None:
        self._config, self._asyppo = config, asyppo
        self._all = group
        is_split = asyppo.placement == "split" and asyppo.num_critics > 1
        self._groups = share_groups(group, asyppo.num_critics) if is_split else [group] * asyppo.num_critics
        self._data_parallel = self._groups[0].world_size // config.critic.fsdp.ulysses_sequence_parallel_size
        for one in {self._all, *self._groups}:
            # verl asks the ranks at their first call, and would then wait for that very call to end.
            one._collect_info[MESH] = one._query_collect_info(MESH)
        self._evaluation: Any = None
        self._updates: dict[int, Any] = {}

    def start_evaluation(self, batch: KVBatchMeta, actor_ranks: int) -> None:
        """Let every mini-critic evaluate every response; returns at once.

        Args:
            batch: balanced over the data-parallel ranks of the actor.
            actor_ranks: how many those are.
        """
        # Where the critics have as many ranks as the actor, its order is balanced for them too.
        keys = batch.keys if self._data_parallel == actor_ranks else self._balanced(batch, [batch.keys])
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
        """Train each mini-critic on its shard; one without responses in this batch sits the step out. Returns at once."""
        for index, shard in enumerate(shards):
            if shard:
                call = self._training_call(batch, index, shard, actor_ranks)
                self._updates[index] = self._groups[index].train_mini_batch(call)

    def finish_update(self) -> dict[str, Any]:
        """Wait until all critics are trained; returns the metrics of this step."""
        updates, self._updates = self._updates, {}
        metrics, of_critic = {}, {}
        for index, update in updates.items():
            of_critic[index] = reduce_metrics(rename_dict(update.get()["metrics"], "critic/"))
            for name in LOGGED_PER_CRITIC:
                metrics[f"asyppo/critic_{index}/{name}"] = of_critic[index][f"critic/{name}"]
        shared: dict[str, Any] = {
            key: [values[key] for values in of_critic.values()] for key in next(iter(of_critic.values()))
        }
        shared["perf/mfu/critic"] = shared.pop("critic/mfu")
        return {**metrics, **reduce_metrics(shared)}

    def _training_call(self, batch: KVBatchMeta, index: int, shard: list[str], actor_ranks: int) -> KVBatchMeta:
        critic, mini_batch_size = self._config.critic, shard_mini_batch_size(self._config, self._asyppo)
        return batch_io.select(
            batch,
            self._training_keys(batch, shard, mini_batch_size, actor_ranks),
            [*batch_io.TRAINING_FIELDS, value_field(index)],
            **{
                CRITIC_ID: index,
                "global_batch_size": mini_batch_size,
                "mini_batch_size": mini_batch_size,
                "epochs": critic.ppo_epochs,
                "seed": critic.data_loader_seed,
                "dataloader_kwargs": {"shuffle": critic.shuffle},
                "temperature": self._config.actor_rollout_ref.rollout.temperature,
            },
        )

    def _training_keys(self, batch: KVBatchMeta, shard: list[str], mini_batch_size: int, actor_ranks: int) -> list[str]:
        """The rows of one training call in the order in which verl cuts them into ranks and mini-batches."""
        if self._asyppo.num_shards > 1:
            padding = batch_io.padding_keys(batch)[: -len(shard) % mini_batch_size]
            steps = mini_batches.mini_batches(mini_batches.spread(shard, padding), mini_batch_size)
        elif self._data_parallel == actor_ranks:
            return batch.keys
        else:
            # The steps of a critic on the actor's ranks, if their number divides a step.
            steps = mini_batches.mini_batches(batch.keys, mini_batch_size, ranks=math.gcd(actor_ranks, mini_batch_size))
        return self._balanced(batch, steps)

    def _balanced(self, batch: KVBatchMeta, steps: list[list[str]]) -> list[str]:
        """The keys of some steps in an order in which the critics' ranks share the work of each step evenly."""
        length_of = {key: tag["seq_len"] for key, tag in zip(batch.keys, batch.tags, strict=True)}
        parts = []
        for keys in steps:
            lengths = torch.tensor([length_of[key] for key in keys], dtype=torch.int64)
            workload = calculate_workload(lengths).tolist()
            dealt = get_seqlen_balanced_partitions(workload, k_partitions=self._data_parallel, equal_size=True)
            parts.append([[keys[i] for i in part] for part in dealt])
        return mini_batches.rank_major(parts)

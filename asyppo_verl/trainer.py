"""AsyPPO on verl's trainers: the few hooks in which it differs from PPO with one critic."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
import torch
from omegaconf import DictConfig, open_dict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.core_algos import compute_gae_advantage_return
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.metric import reduce_metrics
from verl.utils.py_functional import rename_dict
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

from asyppo_verl import asyppo, batch_io, layout, preflight
from asyppo_verl.actor_loss import asyppo_actor_loss
from asyppo_verl.config import TRAINER_PREFIX, shard_mini_batch_size
from asyppo_verl.critics import CRITIC_ID, VALUE_PREFIX, critic_spec, ensemble_worker_class, value_field
from asyppo_verl.metrics import ensemble_metrics, selection_metrics

LOGGED_PER_CRITIC = ("vf_loss", "vf_clipfrac", "grad_norm", "lr")


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """What the critics said of one batch, kept between two hooks of the same step."""

    keys: list[str]
    values_MN: Tensor
    value_N: Tensor
    sigma_N: Tensor


if TYPE_CHECKING:  # the mixin stands before a trainer and uses its attributes
    from verl.trainer.ppo.v1 import PPOTrainer as _Base
else:
    _Base = object


class AsyPPOMixin(_Base):
    """Put before one of verl's V1 trainers: ``class T(AsyPPOMixin, PPOTrainerSync)``."""

    def __init__(self, config: DictConfig) -> None:
        self.asyppo = preflight.read_config(config)
        with open_dict(config):
            config.critic.enable = True
            config.trainer.v1.trainer_mode = config.trainer.v1.trainer_mode.removeprefix(TRAINER_PREFIX)
        super().__init__(config)

    # -- workers ---------------------------------------------------------------------------------------------------

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        specs = [
            critic_spec(preflight.critic_node(self.config, self.asyppo, index), self.asyppo.head_seed + index)
            for index in range(self.asyppo.num_critics)
        ]
        self.role_worker_mapping[Role.Critic] = ray.remote(ensemble_worker_class(specs))

    def _setup(self) -> None:
        super()._setup()
        if self._filters_entropy:
            actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
            self.actor_rollout_wg.set_loss_fn(partial(asyppo_actor_loss, config=actor))

    @property
    def _filters_entropy(self) -> bool:
        return self.asyppo.entropy_filter_fraction > 0 and self.config.actor_rollout_ref.actor.entropy_coeff != 0

    # -- batch -----------------------------------------------------------------------------------------------------

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        shards = self._shards(batch)
        sessions = map(batch_io.session_of, batch_io.response_keys(batch))
        metrics["asyppo/incomplete_groups"] = layout.incomplete_groups(
            sessions, self.config.actor_rollout_ref.rollout.n
        )
        for index, keys in enumerate(shards):
            metrics[f"asyppo/critic_{index}/responses"] = len(keys)
        if not self._train_on_everything:
            rows = layout.padding_needed(map(len, shards), self._mini_batch_size)
            batch = batch_io.add_padding(batch, rows, self.tokenizer.eos_token_id)
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _shards(self, batch: KVBatchMeta) -> list[list[str]]:
        """Keys of the responses that each mini-critic trains on, in batch order."""
        keys = batch_io.response_keys(batch)
        if self._train_on_everything:
            return [keys] * self.asyppo.num_critics
        rows = [batch_io.session_of(key) for key in keys]
        owners = asyppo.assign_shards(rows, num_critics=self.asyppo.num_critics, shard=self.asyppo.shard)
        return [
            [key for key, owner in zip(keys, owners, strict=True) if owner == index]
            for index in range(self.asyppo.num_critics)
        ]

    @property
    def _train_on_everything(self) -> bool:
        return self.asyppo.num_shards == 1

    @property
    def _mini_batch_size(self) -> int:
        return shard_mini_batch_size(self.config, self.asyppo)

    def _training_keys(self, batch: KVBatchMeta, shard: list[str]) -> list[str]:
        """The rows of one training call in the order in which verl cuts them into ranks and mini-batches."""
        if self._train_on_everything:
            return batch.keys
        padding = batch_io.padding_keys(batch)[: -len(shard) % self._mini_batch_size]
        length_of = {key: tag["seq_len"] for key, tag in zip(batch.keys, batch.tags, strict=True)}
        keys = [*shard, *padding]
        ranks = self.critic_wg.world_size // self.config.critic.fsdp.ulysses_sequence_parallel_size
        lengths = torch.tensor([length_of[key] for key in keys], dtype=torch.int64)
        workload = calculate_workload(lengths).tolist()
        parts = get_seqlen_balanced_partitions(workload, k_partitions=ranks, equal_size=True)
        return [keys[i] for i in layout.training_order(len(shard), parts)]

    # -- values and advantages -------------------------------------------------------------------------------------

    def _compute_values(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Every mini-critic evaluates every response; their mean becomes verl's ``values``."""
        call = batch_io.select(
            batch,
            batch.keys,
            batch_io.MODEL_FIELDS,
            compute_loss=False,
            temperature=self.config.actor_rollout_ref.rollout.temperature,
        )
        ray.get(self.critic_wg.infer_batch(call).futures)

        fields = [value_field(index) for index in range(self.asyppo.num_critics)]
        responses = batch_io.fetch(batch, *fields)
        values_MN = torch.stack([responses[field] for field in fields])
        self._refuse_non_finite(values_MN)
        value_N, sigma_N = asyppo.ensemble_value(values_MN)
        self._evaluation = _Evaluation(responses.keys, values_MN, value_N, sigma_N)
        # One critic hands on its own values, dtype included: the run is then verl's PPO to the last bit.
        batch_io.store(batch, responses, values=value_N if self.asyppo.num_critics > 1 else values_MN[0])
        return batch

    def _refuse_non_finite(self, values_MN: Tensor) -> None:
        for index, values_N in enumerate(values_MN):
            if not torch.isfinite(values_N).all():
                raise ValueError(
                    f"mini-critic {index} gave non-finite values in step {self.global_steps}; nothing was trained on them. "
                    "Lower critic.optim.lr or critic.optim.clip_grad, or look for non-finite rewards, and resume from "
                    "the last checkpoint"
                )

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's GAE on the mean value, then the two selections by sigma."""
        with self._adv_estimator("gae"):
            batch = super()._compute_advantage(batch, metrics)
        evaluation = self._evaluation
        responses = batch_io.fetch(batch, "response_mask", "advantages", "returns")
        assert responses.keys == evaluation.keys, "the batch changed between values and advantages"
        is_response_N = responses["response_mask"].bool()
        returns_N, advantages_N = responses["returns"], responses["advantages"]
        changed = {}

        if self.asyppo.critic_lam != self.config.algorithm.lam:
            changed["returns"] = returns_N = self._critic_target(batch)
        keep_adv_N = asyppo.keep_advantage(evaluation.sigma_N, is_response_N, fraction=self.asyppo.adv_mask_fraction)
        keep_ent_N = asyppo.keep_entropy(
            evaluation.sigma_N, is_response_N, fraction=self.asyppo.entropy_filter_fraction
        )
        if not keep_adv_N.all():
            changed["advantages"] = asyppo.mask_advantage(advantages_N, keep_adv_N)
        if self._filters_entropy:
            changed[batch_io.KEEP_ENTROPY] = keep_ent_N

        metrics.update(
            ensemble_metrics(evaluation.values_MN, evaluation.value_N, evaluation.sigma_N, returns_N, is_response_N)
        )
        metrics.update(selection_metrics(advantages_N, keep_adv_N, keep_ent_N, is_response_N))
        fields = batch_io.store(batch, responses, **changed) if changed else batch.fields
        # The actor has no use for the single critics' values.
        batch.fields = [field for field in fields if not field.startswith(VALUE_PREFIX)]
        return batch

    def _critic_target(self, batch: KVBatchMeta) -> Tensor:
        """The lambda-return of the mean value with the critics' own lambda, by verl's GAE."""
        rewards = "token_level_rewards" if self.config.algorithm.use_kl_in_reward else "rm_scores"
        responses = batch_io.fetch(batch, "response_mask", rewards)
        _, target_BT = compute_gae_advantage_return(
            token_level_rewards=responses.padded(responses[rewards]),
            values=responses.padded(self._evaluation.value_N),
            response_mask=responses.padded(responses["response_mask"]),
            gamma=self.config.algorithm.gamma,
            lam=self.asyppo.critic_lam,
        )
        return responses.joined(target_BT)

    @contextlib.contextmanager
    def _adv_estimator(self, name: str) -> Iterator[None]:
        algorithm = self.config.algorithm
        previous, algorithm.adv_estimator = algorithm.adv_estimator, name
        try:
            yield
        finally:
            algorithm.adv_estimator = previous

    # -- critic update ---------------------------------------------------------------------------------------------

    def _update_critic(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Each mini-critic trains on its shard; a critic without responses in this batch sits the step out."""
        futures = {}
        for index, shard in enumerate(self._shards(batch)):
            if shard:
                futures[index] = self.critic_wg.train_mini_batch(self._training_call(batch, index, shard))
        of_critic: dict[int, dict[str, Any]] = {}
        for index, future in futures.items():
            of_critic[index] = reduce_metrics(rename_dict(future.get()["metrics"], "critic/"))
            for name in LOGGED_PER_CRITIC:
                metrics[f"asyppo/critic_{index}/{name}"] = of_critic[index][f"critic/{name}"]
        shared: dict[str, Any] = {
            key: [values[key] for values in of_critic.values()] for key in next(iter(of_critic.values()))
        }
        shared["perf/mfu/critic"] = shared.pop("critic/mfu")
        metrics.update(reduce_metrics(shared))
        return batch

    def _training_call(self, batch: KVBatchMeta, index: int, shard: list[str]) -> KVBatchMeta:
        critic = self.config.critic
        return batch_io.select(
            batch,
            self._training_keys(batch, shard),
            [*batch_io.MODEL_FIELDS, "returns", value_field(index)],
            **{
                CRITIC_ID: index,
                "global_batch_size": self._mini_batch_size,
                "mini_batch_size": self._mini_batch_size,
                "epochs": critic.ppo_epochs,
                "seed": critic.data_loader_seed,
                "dataloader_kwargs": {"shuffle": critic.shuffle},
                "temperature": self.config.actor_rollout_ref.rollout.temperature,
            },
        )


class AsyPPOTrainerSync(AsyPPOMixin, PPOTrainerSync):
    """AsyPPO in verl's ``sync`` mode."""


class AsyPPOTrainerColocateAsync(AsyPPOMixin, PPOTrainerColocateAsync):
    """AsyPPO in verl's ``colocate_async`` mode."""


class AsyPPOTrainerSeparateAsync(AsyPPOMixin, PPOTrainerSeparateAsync):
    """AsyPPO in verl's ``separate_async`` mode."""

    def _setup(self) -> None:
        # verl 0.9.1 gives the logger print's `flush` when hybrid_engine=False, which fails wherever level INFO is on.
        logger = logging.getLogger(PPOTrainerSeparateAsync.__module__)
        level = logger.level
        logger.setLevel(max(level, logging.WARNING))
        try:
            super()._setup()
        finally:
            logger.setLevel(level)


TRAINERS = {
    f"{TRAINER_PREFIX}sync": AsyPPOTrainerSync,
    f"{TRAINER_PREFIX}colocate_async": AsyPPOTrainerColocateAsync,
    f"{TRAINER_PREFIX}separate_async": AsyPPOTrainerSeparateAsync,
}
"""Trainer classes by the mode names that :func:`asyppo_verl.preflight.prepare` sets."""

"""AsyPPO on verl's trainers: the few hooks in which it differs from PPO with one critic."""

import contextlib
import functools
import logging
import math
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from omegaconf import DictConfig
from ray.util import placement_group_table
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.core_algos import compute_gae_advantage_return
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.debug import marked_timer

from asyppo_verl import asyppo, batch_checks, batch_io, inspection, mini_batches, selection
from asyppo_verl.actor_loss import asyppo_actor_loss
from asyppo_verl.adaptive_lam import AdaptiveLam
from asyppo_verl.config import TRAINER_PREFIX, trainer_mode
from asyppo_verl.critic_client import CriticClient
from asyppo_verl.critic_settings import critic_nodes, read_config
from asyppo_verl.critic_worker import VALUE_PREFIX, ensemble_worker_class, value_field, worker_configs
from asyppo_verl.metrics import ensemble_metrics, mask_metrics, selection_metrics
from asyppo_verl.retention import Saved, older_ones_last

logger = logging.getLogger(__name__)

CRITIC_POOL = "critic_pool"
"""verl's name for the GPUs of ``asyppo.pool``."""


if TYPE_CHECKING:  # the mixin stands before a trainer and uses its attributes
    from verl.trainer.ppo.v1 import PPOTrainer as _Base
else:
    _Base = object


class AsyPPOMixin(_Base):
    """Put before one of verl's V1 trainers: ``class T(AsyPPOMixin, PPOTrainerSync)``."""

    total_training_steps: int
    _has_warned = _is_blind = False

    def __init__(self, config: DictConfig) -> None:
        self.asyppo = read_config(config)
        config.trainer.v1.trainer_mode = trainer_mode(config)
        super().__init__(config)

    def _init_dataloader(self) -> None:
        """verl's, after which the last step is the one that the data last for: it is saved and validated as the last."""
        super()._init_dataloader()
        lasts = self.steps_per_epoch * math.ceil(self.config.trainer.total_epochs)
        if lasts < self.total_training_steps:
            logger.warning(
                f"the data last for {lasts} steps, so the run ends before trainer.total_training_steps="
                f"{self.total_training_steps}; raise trainer.total_epochs={self.config.trainer.total_epochs} to go on"
            )
            self.total_training_steps = lasts

    # -- workers ---------------------------------------------------------------------------------------------------

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        worker = ensemble_worker_class(
            worker_configs(critic_nodes(self.config, self.asyppo)),
            head_seed=self.asyppo.head_seed,
            split=self.asyppo.placement == "split",
            compiles=self.asyppo.compile_critics,
        )
        self.role_worker_mapping[Role.Critic] = ray.remote(worker)
        if self.asyppo.critics_are_apart:
            pool = self.asyppo.pool
            self.resource_pool_manager.resource_pool_spec[CRITIC_POOL] = [pool.n_gpus_per_node] * pool.nnodes
            self.resource_pool_manager.mapping[Role.Critic] = CRITIC_POOL

    def _setup(self) -> None:
        super()._setup()
        if self._has_entropy_bonus:
            actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
            self.actor_rollout_wg.set_loss_fn(partial(asyppo_actor_loss, config=actor))

    @property
    def _has_entropy_bonus(self) -> bool:
        return self.config.actor_rollout_ref.actor.entropy_coeff != 0

    # -- batch -----------------------------------------------------------------------------------------------------

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        batch_checks.check_rollouts(batch.keys, self.global_steps)
        shards = self._shards(batch)
        sessions = map(batch_io.session_of, batch_io.response_keys(batch))
        metrics["asyppo/incomplete_groups"] = mini_batches.incomplete_groups(
            sessions, self.config.actor_rollout_ref.rollout.n
        )
        for index, keys in enumerate(shards):
            metrics[f"asyppo/critic_{index}/responses"] = len(keys)
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _shards(self, batch: KVBatchMeta) -> list[list[str]]:
        """Keys of the responses that each mini-critic trains on, in batch order."""
        keys = batch_io.response_keys(batch)
        if self.asyppo.shard == "none" or self.asyppo.num_critics == 1:
            return [keys] * self.asyppo.num_critics
        rows = [batch_io.session_of(key) for key in keys]
        owners = asyppo.assign_shards(rows, num_critics=self.asyppo.num_critics, shard=self.asyppo.shard)
        return [
            [key for key, owner in zip(keys, owners, strict=True) if owner == index]
            for index in range(self.asyppo.num_critics)
        ]

    # -- values and advantages -------------------------------------------------------------------------------------

    @functools.cached_property
    def _critics(self) -> CriticClient:
        return CriticClient(self.critic_wg, self.config, self.asyppo, self.tokenizer.eos_token_id)

    @property
    def _actor_ranks(self) -> int:
        return max(self.actor_rollout_wg._dispatch_info["actor"]) + 1

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's first pass of the actor; critics with GPUs of their own evaluate at the same time."""
        if self.asyppo.critics_are_apart:
            self._critics.start_evaluation(batch, self._actor_ranks)
        return self._for_the_actor(super()._compute_old_log_prob(batch, metrics))

    @staticmethod
    def _for_the_actor(batch: KVBatchMeta) -> KVBatchMeta:
        """The batch without the single critics' values, which no model of the actor has a use for."""
        if batch.fields:
            batch.fields = [field for field in batch.fields if not field.startswith(VALUE_PREFIX)]
        return batch

    def _compute_values(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Every mini-critic evaluates every response."""
        if not self.asyppo.critics_are_apart:
            self._critics.start_evaluation(batch, self._actor_ranks)
        self._critics.finish_evaluation()
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Steps 2 to 5 of :mod:`asyppo_verl.asyppo`; the third is verl's."""
        # 2. The critics' mean, and how much they disagree.
        values_MN, value_N, sigma_N = self._ensemble_value(batch)
        # 3. GAE on the mean.
        with self._adv_estimator("gae"):
            batch = super()._compute_advantage(batch, metrics)
        responses = batch_io.fetch(batch, "response_mask", "advantages", "returns")
        is_response_N = responses["response_mask"].bool()
        batch_checks.check_returns(
            responses["returns"], is_response_N, responses.keys, responses.offsets, self.global_steps
        )
        lam = self.config.algorithm.lam
        if self.asyppo.critic_lam != lam:
            _, returns_N = self._gae(batch, responses, value_N, self.asyppo.critic_lam)
            self._change(batch, responses, returns=returns_N)
        metrics.update(ensemble_metrics(values_MN, value_N, sigma_N, responses["returns"], is_response_N))
        explained = metrics["asyppo/explained_var"]
        metrics["asyppo/lam"] = self._adaptive_lam(explained) if self.asyppo.adaptive_lam else lam
        if self.asyppo.update_critics_first:
            return batch
        if metrics["asyppo/lam"] != lam:
            advantages_N, _ = self._gae(batch, responses, value_N, metrics["asyppo/lam"])
            self._change(batch, responses, advantages=advantages_N)
        return self._apply_selections(batch, responses, values_MN, value_N, sigma_N, metrics)

    def _compute_advantage_again(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """The advantages, with the values of critics that have learned from the batch; their targets stay what they were."""
        self._critics.start_evaluation(batch, self._actor_ranks)
        self._critics.finish_evaluation()
        values_MN, value_N, sigma_N = self._ensemble_value(batch)
        responses = batch_io.fetch(batch, "response_mask", "returns")
        advantages_N, _ = self._gae(batch, responses, value_N, metrics["asyppo/lam"])
        self._change(batch, responses, advantages=advantages_N)
        return self._apply_selections(batch, responses, values_MN, value_N, sigma_N, metrics)

    @staticmethod
    def _change(batch: KVBatchMeta, responses: batch_io.Responses, **fields_N: Tensor) -> None:
        """Put these fields in the place of those that are stored, and of those at hand."""
        batch.fields = batch_io.store(batch, responses, **fields_N)
        responses.fields.update(fields_N)

    @functools.cached_property
    def _adaptive_lam(self) -> AdaptiveLam:
        return AdaptiveLam(self.config.algorithm.lam)

    def _apply_selections(
        self,
        batch: KVBatchMeta,
        responses: batch_io.Responses,
        values_MN: Tensor,
        value_N: Tensor,
        sigma_N: Tensor,
        metrics: dict,
    ) -> KVBatchMeta:
        """Steps 4 and 5."""
        advantages_N, returns_N = responses["advantages"], responses["returns"]
        is_response_N = responses["response_mask"].bool()
        # 4. The two selections.
        given = {"sigma_N": sigma_N, "value_N": value_N, "values_MN": values_MN, "returns_N": returns_N}
        given |= {"advantages_N": advantages_N, "is_response_N": is_response_N}
        given |= {"explained_var": metrics["asyppo/explained_var"]}
        keep_adv_N, keep_ent_N = self._select_tokens(batch, given | {"offsets": responses.offsets})
        # 5. Both applied; the second one in the actor's loss.
        changed = {}
        if not keep_adv_N.all():
            changed["advantages"] = asyppo.mask_advantage(advantages_N, keep_adv_N)
        if self._has_entropy_bonus:
            changed[batch_io.KEEP_ENTROPY] = keep_ent_N
        metrics.update(selection_metrics(advantages_N, sigma_N, keep_adv_N, keep_ent_N, is_response_N))
        metrics.update(mask_metrics(advantages_N, returns_N, keep_adv_N, is_response_N))
        self._warn(metrics)
        if changed:
            batch.fields = batch_io.store(batch, responses, **changed)
        if self.asyppo.inspect.is_due(self.global_steps):
            self._inspect(
                batch, responses, values_MN=values_MN, sigma_N=sigma_N, keep_adv_N=keep_adv_N, keep_ent_N=keep_ent_N
            )
        return self._for_the_actor(batch)

    def _warn(self, metrics: dict) -> None:
        """Warn, each once in a run, of critics that explain nothing and of critics that are nearly equal."""
        selects = metrics["asyppo/adv_masked_fraction"] > 0 or metrics["asyppo/entropy_filtered_fraction"] > 0
        if not self._is_blind and self.asyppo.num_critics > 1 and selects:
            self._explained.append(metrics["asyppo/explained_var"])
            self._is_blind = batch_checks.warn_of_blind_critics(self._explained, self.global_steps)
        if not self._has_warned:
            self._has_warned = batch_checks.warn_of_ties(metrics["asyppo/sigma/tied"], self.global_steps)

    def _ensemble_value(self, batch: KVBatchMeta) -> tuple[Tensor, Tensor, Tensor]:
        """The critics' values, their mean, which is stored as verl's ``values``, and sigma."""
        fields = [value_field(index) for index in range(self.asyppo.num_critics)]
        responses = batch_io.fetch(batch, "response_mask", *fields)
        values_MN = torch.stack([responses[field] for field in fields])
        batch_checks.check_responses(responses["response_mask"], self.global_steps)
        batch_checks.check_values(values_MN, self.global_steps)
        value_N, sigma_N = asyppo.ensemble_value(values_MN)
        # One critic hands on its own values, dtype included: the run is then verl's PPO to the last bit.
        batch_io.store(batch, responses, values=value_N if self.asyppo.num_critics > 1 else values_MN[0])
        return values_MN, value_N, sigma_N

    @functools.cached_property
    def _explained(self) -> deque[float]:
        """Explained variance of the mean value in the last steps."""
        return deque(maxlen=batch_checks.STEPS_TO_LEARN)

    @functools.cached_property
    def _selection(self) -> selection.Selection:
        return selection.load(self.asyppo.selection)

    def _select_tokens(self, batch: KVBatchMeta, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The two selections of the step, by the function that ``asyppo.selection`` names."""
        fractions = {
            "adv_mask_fraction": self.asyppo.adv_mask_fraction,
            "entropy_filter_fraction": self.asyppo.entropy_filter_fraction,
        }
        return selection.select(self._selection, {**given, **fractions}, partial(batch_io.read, batch))

    def _inspect(self, batch: KVBatchMeta, responses: batch_io.Responses, **vectors: Tensor) -> None:
        """Keep a few groups for the report's token view."""
        folder = Path(self.config.trainer.default_local_dir, self.asyppo.inspect.folder)
        groups = self.asyppo.inspect.groups
        inspection.write(
            folder, self.global_steps, batch, self.tokenizer, groups=groups, responses=responses, **vectors
        )

    def _gae(
        self, batch: KVBatchMeta, responses: batch_io.Responses, value_N: Tensor, lam: float
    ) -> tuple[Tensor, Tensor]:
        """Whitened advantages and lambda-returns of the mean value, by verl's GAE on the rewards of its own pass."""
        rewards = "token_level_rewards" if self.config.algorithm.use_kl_in_reward else "rm_scores"
        rewards_N = batch_io.fetch(batch, rewards)[rewards]
        advantages_BT, returns_BT = compute_gae_advantage_return(
            token_level_rewards=responses.padded(rewards_N),
            values=responses.padded(value_N),
            response_mask=responses.padded(responses["response_mask"]),
            gamma=self.config.algorithm.gamma,
            lam=lam,
        )
        return responses.joined(advantages_BT), responses.joined(returns_BT)

    @contextlib.contextmanager
    def _adv_estimator(self, name: str) -> Iterator[None]:
        algorithm = self.config.algorithm
        previous, algorithm.adv_estimator = algorithm.adv_estimator, name
        try:
            yield
        finally:
            algorithm.adv_estimator = previous

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self._saved = Saved.of(self.config.trainer, self.global_steps)

    def _save_checkpoint(self) -> None:
        with older_ones_last(self.config, self._saved, self.global_steps, self._nodes):
            super()._save_checkpoint()

    @functools.cached_property
    def _nodes(self) -> set[str]:
        """Ray's names of the nodes that the models are on."""
        groups = [group for pool in self.resource_pool_manager.resource_pool_dict.values() for group in pool.pgs or ()]
        return {node for group in groups for node in placement_group_table(group)["bundles_to_node_id"].values()}

    # -- critic update ---------------------------------------------------------------------------------------------

    @property
    def _waits_for_critics(self) -> bool:
        """True if the actor's update begins when the critics' has ended."""
        return self.asyppo.update_critics_first or not self.asyppo.critics_are_apart

    def _update_critic(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Each mini-critic trains on its shard, beside the actor if it has GPUs of its own and the actor need not wait."""
        self._critics.start_update(batch, self._shards(batch), self._actor_ranks)
        if self._waits_for_critics:
            metrics.update(self._critics.finish_update(self.global_steps))
        if self.asyppo.update_critics_first:
            batch = self._compute_advantage_again(batch, metrics)
        return batch

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        """verl's step; after it the critics are trained, whether or not the actor was updated."""
        batch = super()._step_once(metrics, timing_raw, sample_batch_size)
        if not self._waits_for_critics:
            with marked_timer("update_critic", timing_raw, color="pink"):
                metrics.update(self._critics.finish_update(self.global_steps))
        return batch


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

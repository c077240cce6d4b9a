"""What of verl goes together with AsyPPO: versions, trainers, estimators, losses."""

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from asyppo_verl import selection
from asyppo_verl.config import (
    ESTIMATOR,
    PLUGIN_MODULE,
    SUPPORTED_VERL,
    TRAINER_MODES,
    AsyPPOConfig,
    check_known,
    is_supported_verl,
    trainer_mode,
    verl_version,
)
from asyppo_verl.critic_settings import Run

OPTIONS = [field.name for field in dataclasses.fields(AsyPPOConfig) if "_" in field.name]
"""Those of AsyPPO's options whose names mean nothing else."""

LOSS_AGG_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
"""How verl averages a loss; a test compares with verl's own function."""


def check_estimator(config: Any) -> None:
    """Refuse an estimator spelt "AsyPPO" or "asy_ppo", which verl rejects after its first rollout."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    name = str(config.algorithm.adv_estimator)
    if _plain(name) == ESTIMATOR and name not in ADV_ESTIMATOR_REGISTRY and not _registers_in_workers(config):
        raise ValueError(f"algorithm.adv_estimator={name!r} is not an estimator; it is spelt {ESTIMATOR}")


def check_version(_run: Run) -> Iterator[str]:
    """Refuse a verl that this package is not tested with; say it of a build between releases."""
    version, tested = verl_version(), ", ".join(f"verl=={supported}" for supported in SUPPORTED_VERL)
    if not is_supported_verl():
        raise ValueError(f"verl=={version} is not supported by asyppo_verl; install one of {tested}")
    if version not in SUPPORTED_VERL:
        yield f"verl=={version} is a build that asyppo_verl was not tested with; tested are {tested}"


def check_places(run: Run) -> Iterator[str]:
    """Refuse options of AsyPPO that stand elsewhere than below ``asyppo``, where nothing reads them."""
    names = {str(key): str(key) for key in run.config} | {f"algorithm.{key}": str(key) for key in run.config.algorithm}
    for path, key in names.items():
        if key in OPTIONS or path == f"algorithm.{ESTIMATOR}":
            raise ValueError(
                f"{path}={run.get(path)!r} would not be read: the options of AsyPPO stand below {ESTIMATOR}; "
                f"set +{ESTIMATOR}.{key if key in OPTIONS else 'num_critics'}=..."
            )
        if path == key != ESTIMATOR and difflib.SequenceMatcher(None, _plain(key), ESTIMATOR).ratio() > 0.75:
            yield f"{path}={run.get(path)!r} is not read by AsyPPO, whose options stand below {ESTIMATOR}"


def check_trainer(run: Run) -> Iterator[str]:
    """Refuse trainers, strategies and algorithms under which AsyPPO could not do what was asked."""
    config, actor = run.config, run.get("actor_rollout_ref.actor.strategy")
    check_known("trainer.v1.trainer_mode", trainer_mode(config), TRAINER_MODES)
    for key, is_right, why in (
        ("trainer.use_v1", config.trainer.use_v1, "AsyPPO needs verl's V1 trainer; set it to True"),
        ("critic.enable", config.critic.enable in (None, True), "AsyPPO is PPO with critics; remove it, or use grpo"),
        (
            "critic._target_",
            run.get("critic.fsdp._target_"),
            "mini-critics run on FSDP; take critic=dp_critic, without what only another engine's critic has",
        ),
        ("critic.strategy", config.critic.strategy in ("fsdp", "fsdp2"), "mini-critics run on FSDP; set fsdp or fsdp2"),
        (
            "asyppo.compile_critics",
            not run.asyppo.compile_critics or config.critic.strategy == "fsdp2",
            "under FSDP1 each layer would be compiled anew, until the compiler gives up; set critic.strategy=fsdp2",
        ),
        (
            "asyppo.compile_critics",
            not (run.asyppo.compile_critics and run.get("critic.model.enable_activation_offload")),
            "a layer's forward is then verl's wrapper, whose bookkeeping is not to be compiled; set "
            "critic.model.enable_activation_offload=False",
        ),
        (
            "distillation.enabled",
            not run.get("distillation.enabled"),
            "its actor loss replaces AsyPPO's; set it to False",
        ),
        (
            "algorithm.use_pf_ppo",
            not run.get("algorithm.use_pf_ppo"),
            "rows of the batch would be resampled and stored under the keys of others, so values, shards and selections "
            "would be of other responses; set it to False",
        ),
    ):
        if not is_right:
            raise ValueError(f"{key}={run.get(key)!r}: {why}")
    if actor not in ("fsdp", "fsdp2"):
        yield f"actor_rollout_ref.actor.strategy={actor}: AsyPPO has been tested with actors on fsdp and fsdp2 only"


def check_shards(run: Run) -> None:
    """Refuse groups with fewer responses than there are mini-critics, where groups are split."""
    asyppo, n = run.asyppo, run.config.actor_rollout_ref.rollout.n
    if asyppo.shard == "group" and n < asyppo.num_critics and not run.get("trainer.val_only"):
        raise ValueError(
            f"actor_rollout_ref.rollout.n={n} is below asyppo.num_critics={asyppo.num_critics}: every mini-critic needs a "
            "response of every prompt; raise n, lower num_critics, or deal out whole prompts with asyppo.shard=prompt"
        )


def check_selection(run: Run) -> None:
    """Refuse a selection that cannot be imported here."""
    selection.load(run.asyppo.selection)


def check_losses(run: Run) -> Iterator[str]:
    """Refuse losses that verl rejects at its first update, or that do not honour the mask; say what is idle."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    asyppo, actor = run.asyppo, "actor_rollout_ref.actor"
    key, mode = f"{actor}.policy_loss.loss_mode", run.get(f"{actor}.policy_loss.loss_mode") or "vanilla"
    check_known("critic.loss_agg_mode", run.config.critic.loss_agg_mode, LOSS_AGG_MODES)
    if not _registers_in_workers(run.config):
        check_known(key, mode, tuple(POLICY_LOSS_REGISTRY))
    if mode == "dro" and asyppo.adv_mask_fraction > 0:
        raise ValueError(
            f"{key}='dro' moves tokens whose advantage is 0, so the advantage mask would not hold; choose another loss_mode or "
            "set asyppo.adv_mask_fraction=0"
        )
    if mode in ("kl_cov", "clip_cov", "geo_mean") and asyppo.adv_mask_fraction > 0:
        yield (
            f"{key}={mode!r} looks at all tokens of a batch at once, so masked advantages change what it does to other tokens"
            + ("; masked tokens may move too" if mode == "kl_cov" else "")
        )
    if asyppo.entropy_filter_fraction > 0 and run.get(f"{actor}.entropy_coeff") == 0:
        yield (
            f"asyppo.entropy_filter_fraction={asyppo.entropy_filter_fraction} is idle: {actor}.entropy_coeff=0 gives no "
            "entropy bonus to filter"
        )


def _registers_in_workers(config: Any) -> bool:
    """True if code of the user is loaded in Ray's workers only, where it can teach verl names unknown here."""
    modules = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES") or ""
    libraries = [OmegaConf.select(config, f"{node}.model.external_lib") for node in ("actor_rollout_ref", "critic")]
    return any([*libraries, *(name for name in str(modules).split(",") if name != PLUGIN_MODULE)])


def _plain(name: Any) -> str:
    return str(name).lower().replace("_", "").replace("-", "")

"""The options of AsyPPO, with the paper's defaults."""

import dataclasses
import difflib
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

ESTIMATOR = "asyppo"
"""The name in ``algorithm.adv_estimator``."""

SUPPORTED_VERL = ("0.9.0", "0.9.1")
"""The verl releases that this package is tested with."""

PLUGIN_MODULE = "asyppo_verl.plugin"
"""What a process imports to know AsyPPO."""

TRAINER_MODES = ("sync", "colocate_async", "separate_async")
"""verl's trainers, ``trainer.v1.trainer_mode``."""

TRAINER_PREFIX = "asyppo_"
"""Ours are called "asyppo_sync" and so on, names that only a process with the plugin knows."""

OVERRIDABLE = (
    "model",
    "optim",
    "fsdp",
    "use_dynamic_bsz",
    "ppo_max_token_len_per_gpu",
    "forward_max_token_len_per_gpu",
    "ppo_micro_batch_size_per_gpu",
    "forward_micro_batch_size_per_gpu",
)
"""Keys of verl's ``critic`` node that a single mini-critic may have to itself: how it is built and fed, not its loss."""

SHARDS = ("group", "prompt", "none")
"""How responses are dealt to the mini-critics, ``asyppo.shard``."""

PLACEMENTS = ("colocated", "pool", "split")
"""Where the mini-critics can run, ``asyppo.placement``."""


class _Counts:
    """A node of whole numbers below ``asyppo``."""

    name: ClassVar[str]
    example: ClassVar[str]

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"asyppo.{self.name}.{key}={value!r} must be a whole number, 0 or more")

    @classmethod
    def from_node(cls, node: Any) -> Self:
        """Build from the node as a plain mapping.

        Raises:
            ValueError: if it is no mapping, on an unknown key, and on bad values.
        """
        if not isinstance(node, Mapping):
            raise ValueError(f"asyppo.{cls.name}={node!r} must be a mapping such as {cls.example}")
        names = [field.name for field in dataclasses.fields(cast(Any, cls))]
        for key in node:
            if key not in names:
                raise ValueError(
                    f"asyppo.{cls.name}.{key}={node[key]!r} is not a setting{nearest(key, names)}; "
                    f"valid keys: {', '.join(names)}"
                )
        return cls(**node)


@dataclasses.dataclass(frozen=True)
class CriticPool(_Counts):
    """The GPUs that belong to the mini-critics alone, on top of those of ``trainer``.

    Raises:
        ValueError: if a value is not a whole number, or negative.
    """

    name, example = "pool", "{n_gpus_per_node: 4, nnodes: 1}"

    n_gpus_per_node: int = 0
    """GPUs per node; 0: there is no such pool."""

    nnodes: int = 1
    """Nodes."""

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.n_gpus_per_node * self.nnodes


@dataclasses.dataclass(frozen=True)
class Inspect(_Counts):
    """Which steps and prompts are kept token by token, for the token view of a report.

    Raises:
        ValueError: if a value is not a whole number, or negative.
    """

    name, example = "inspect", "{every: 50, groups: 2}"
    folder: ClassVar = "inspect"
    """Where they are kept, inside ``trainer.default_local_dir``."""

    every: int = 0
    """Every so many steps; 0: never."""

    groups: int = 2
    """Prompts of such a step, each with all its responses: a token takes about 35 bytes on disk."""

    def is_due(self, step: int) -> bool:
        """True for the steps that are kept."""
        return self.every > 0 and step % self.every == 0


@dataclasses.dataclass(frozen=True)
class AsyPPOConfig:
    """The top-level ``asyppo`` node of a verl configuration; every key is optional.

    Raises:
        ValueError: if a value is out of range, naming key, value and fix.
    """

    num_critics: int = 2
    """M, the number of mini-critics. 2 in the paper; with 1, and ``critic_lam`` as ``algorithm.lam``, the run is verl's PPO."""

    adv_mask_fraction: float = 0.2
    """k, the share of response tokens, those where the critics agree most, whose advantage is set to 0. 0.2 in the paper."""

    entropy_filter_fraction: float = 0.2
    """h, the share of response tokens, those where the critics disagree most, left out of the entropy bonus. 0.2 in the
    paper. Idle while ``actor_rollout_ref.actor.entropy_coeff`` is 0."""

    critic_lam: float = 1.0
    """Lambda of the critics' target (``algorithm.lam`` is the actor's). 1 is the Monte-Carlo return, as others
    read the paper; below 1 the target is the lambda-return of the ensemble mean (our decision)."""

    shard: str = "group"
    """Which responses a critic trains on: "group" (the paper: every group is split evenly), "prompt" (whole groups), "none"
    (all responses; an ablation)."""

    update_critics_first: bool = False
    """Critics train on a step's responses before its advantages are computed; False is the paper's order. Values are taken twice:
    before, for the critics' targets, clipping and metrics, and after, for advantages and selections (ours)."""

    adaptive_lam: bool = False
    """The lambda of the advantages falls from ``algorithm.lam`` to 0 as the critics' explained variance rises from 0.1 to 0.3
    (ours)."""

    selection: str = "asyppo_verl.asyppo.select_tokens"
    """The function that makes both selections of a step, ``package.module.function``; the place for a rule of one's own
    (ours)."""

    head_seed: int = 1000
    """Critic m draws its new value head with seed ``head_seed + m`` (our decision; the paper is silent)."""

    placement: str = "colocated"
    """Where the critics run: "colocated" (on the actor's GPUs, taking turns), "pool" (all on GPUs of their own, beside the
    actor), "split" (each on its own share of those, all at the same time). The results do not depend on it (ours)."""

    pool: CriticPool = dataclasses.field(default_factory=CriticPool)
    """The critics' own GPUs, for "pool" and "split": ``{n_gpus_per_node: 4, nnodes: 1}``."""

    compile_critics: bool = False
    """Compile the critics' layers with torch.compile: the same values and gradients up to rounding, sooner; the first steps
    take longer (ours)."""

    inspect: Inspect = dataclasses.field(default_factory=Inspect)
    """Keep some prompts of some steps token by token, for the report: ``{every: 50, groups: 2}``. Off by default (ours)."""

    critic_overrides: Mapping[int, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Settings of single critics on top of verl's ``critic`` node: ``{1: {model: {path: ...}, optim: {lr: 1e-5}}}``."""

    def __post_init__(self) -> None:
        check_known("asyppo.shard", self.shard, SHARDS)
        check_known("asyppo.placement", self.placement, PLACEMENTS)
        self._check_types()
        if not 0 <= self.head_seed < 2**32:
            raise ValueError(f"asyppo.head_seed={self.head_seed} must lie in [0, 2**32)")
        if self.num_critics < 1:
            raise ValueError(f"asyppo.num_critics={self.num_critics} must be at least 1; the paper uses 2")
        for key in ("adv_mask_fraction", "entropy_filter_fraction"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(
                    f"asyppo.{key}={getattr(self, key)} must lie in [0, 1); 0 switches it off, the paper uses 0.2"
                )
        if self.adv_mask_fraction + self.entropy_filter_fraction > 1:
            raise ValueError(
                f"asyppo.adv_mask_fraction={self.adv_mask_fraction} and asyppo.entropy_filter_fraction="
                f"{self.entropy_filter_fraction} sum to more than 1, so they would overlap; lower one of them"
            )
        if not 0 <= self.critic_lam <= 1:
            raise ValueError(f"asyppo.critic_lam={self.critic_lam} must lie in [0, 1]; 1 is the Monte-Carlo return")
        self._check_overrides()

    @property
    def critics_are_apart(self) -> bool:
        """True if the critics have GPUs of their own, and so work at the same time as the actor."""
        return self.placement != "colocated"

    def _check_types(self) -> None:
        """Refuse a value of another kind than its default."""
        kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            fits = isinstance(value, (int, float) if kind is float else kind)
            if kind in kinds and not (fits and isinstance(value, bool) == (kind is bool)):
                raise ValueError(f"asyppo.{field.name}={value!r} must be {kinds[kind]}")

    def _check_overrides(self) -> None:
        if not isinstance(self.critic_overrides, Mapping):
            raise ValueError(
                f"asyppo.critic_overrides={self.critic_overrides!r} must map a critic's index to settings of verl's critic "
                "node, for example {1: {optim: {lr: 1e-5}}}"
            )
        for index, overrides in self.critic_overrides.items():
            if index not in range(self.num_critics):
                raise ValueError(
                    f"asyppo.critic_overrides names critic {index!r}, but with asyppo.num_critics={self.num_critics} the "
                    f"critics are 0 to {self.num_critics - 1}"
                )
            if not isinstance(overrides, Mapping):
                raise ValueError(
                    f"asyppo.critic_overrides.{index}={overrides!r} must be a mapping such as {{optim: {{lr: 1e-5}}}}"
                )

    @classmethod
    def from_node(cls, node: Mapping[str, Any] | None) -> "AsyPPOConfig":
        """Build from the ``asyppo`` node as a plain mapping (None: all defaults).

        Raises:
            ValueError: on an unknown key, naming the nearest valid one, and on bad values.
        """
        node = dict(node or {})
        names = [field.name for field in dataclasses.fields(cls)]
        for key in node:
            if key not in names:
                raise ValueError(
                    f"asyppo.{key}={node[key]!r} is not a setting of AsyPPO{nearest(key, names)}; valid keys: {', '.join(names)}"
                )
        overrides = node.get("critic_overrides")
        if isinstance(overrides, Mapping):
            # A command line gives the indices as text.
            node["critic_overrides"] = {int(k) if str(k).isdecimal() else k: v for k, v in overrides.items()}
        elif overrides is None:
            node.pop("critic_overrides", None)
        if "pool" in node:
            node["pool"] = CriticPool.from_node(node["pool"])
        if "inspect" in node:
            node["inspect"] = Inspect.from_node(node["inspect"])
        return cls(**node)


def is_asyppo(config: Any) -> bool:
    """True if ``algorithm.adv_estimator`` is asyppo."""
    return str(config.algorithm.adv_estimator) == ESTIMATOR


def trainer_mode(config: Any) -> str:
    """The mode as verl calls it, before and after :func:`asyppo_verl.preflight.prepare`."""
    return str(config.trainer.v1.trainer_mode).removeprefix(TRAINER_PREFIX)


def verl_version() -> str:
    """The version of the installed verl."""
    return importlib.metadata.version("verl")


def is_supported_verl() -> bool:
    """True if the installed verl is a release that this package is tested with, or a dev, rc, post or local build of one."""
    release = re.match(r"\d+(\.\d+)*", verl_version())
    return release is not None and release[0] in SUPPORTED_VERL


def nearest(key: str, names: Sequence[str]) -> str:
    """A hint for an error message: the valid name that a mistyped one is closest to, or nothing."""
    close = difflib.get_close_matches(str(key), names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def check_known(key: str, value: Any, names: Sequence[str]) -> None:
    """Refuse a value that is not among ``names``.

    Raises:
        ValueError: naming key, value, the nearest valid one and all of them.
    """
    if value not in names:
        raise ValueError(f"{key}={value!r} is unknown{nearest(value, names)}; set one of {', '.join(names)}")

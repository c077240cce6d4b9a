"""Values that verl takes as they are, and that stop a run after minutes, or spoil it without a word."""

import functools
import importlib.resources
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from asyppo_verl.critic_settings import Run
from asyppo_verl.preflight.gpus import critic_ranks, ranks_key

SECTIONS = ("algorithm", "actor_rollout_ref", "critic", "data", "trainer")
"""Where types are compared with verl's defaults; elsewhere values go on to libraries that may take other types."""

TRUE_TEXTS = ("true", "yes", "on")
ALSO_TEXT = ("algorithm.rollout_correction.rollout_is_threshold",)
"""Numbers that verl takes as text too, here "lower_upper"."""


def is_count(value: Any) -> bool:
    """True for a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> bool:
    """True for any number but nan."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


COUNT = ("must be a whole number, 1 or more", is_count)
NUMBER = ("must be a number", is_number)
# verl multiplies gradients by what is 0 or negative.
CLIP = ("must be above 0; inf (in YAML .inf) for no bound", lambda value: is_number(value) and value > 0)
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "data.train_batch_size": COUNT,
    "data.max_prompt_length": COUNT,
    "data.max_response_length": COUNT,
    "actor_rollout_ref.rollout.n": COUNT,
    "actor_rollout_ref.rollout.prompt_length": COUNT,
    "actor_rollout_ref.rollout.response_length": COUNT,
    "actor_rollout_ref.actor.ppo_mini_batch_size": COUNT,
    "actor_rollout_ref.actor.ppo_epochs": COUNT,
    "actor_rollout_ref.actor.optim.clip_grad": CLIP,
    "critic.ppo_mini_batch_size": COUNT,
    "critic.ppo_epochs": COUNT,
    "critic.fsdp.ulysses_sequence_parallel_size": COUNT,
    "critic.cliprange_value": NUMBER,
    "critic.optim.lr": NUMBER,
    "critic.optim.clip_grad": CLIP,
    "algorithm.gamma": NUMBER,
    "algorithm.lam": NUMBER,
    "trainer.nnodes": COUNT,
    "trainer.n_gpus_per_node": COUNT,
    "trainer.total_epochs": NUMBER,
    "trainer.save_freq": NUMBER,
    "trainer.test_freq": NUMBER,
    "trainer.total_training_steps": ("must be a number, or null", lambda value: value is None or is_number(value)),
}
"""What a key must be, in words, and the function that says so."""

IGNORED = {
    "critic.ulysses_sequence_parallel_size": "critic.fsdp.ulysses_sequence_parallel_size",
    "critic.grad_clip": "critic.optim.clip_grad",
}
"""Settings that verl offers and does not read, and those that it reads instead."""

MOVED = ("custom_reward_function", "reward_model", "sandbox_fusion")
"""Nodes of verl that stand below ``reward`` now, and are read there only."""

CORRECTION, LOSS = "algorithm.rollout_correction", "actor_rollout_ref.actor.policy_loss"
"""In bypass mode verl's V1 trainer reads not the first but, with ``loss_mode=bypass_mode``, the second's rollout_correction."""

SAMPLING = {
    "temperature": ("must be a number of 0 or more", lambda value: is_number(value) and 0 <= value < math.inf),
    "top_p": ("must be above 0 and at most 1; 1 for all tokens", lambda value: is_number(value) and 0 < value <= 1),
    "top_k": (
        "must be a whole number, 1 or more; -1 for all tokens",
        lambda value: isinstance(value, int) and value >= -1,
    ),
}
"""The same below ``rollout`` and, where the run validates, ``rollout.val_kwargs``."""


def check_types(run: Run) -> None:
    """Refuse switches and numbers that are text, such as "no", which counts as true, and groups that are single values."""
    for section in SECTIONS:
        given = cast(dict, OmegaConf.to_container(run.config[section], resolve=True))
        found = dict(_misfits(given, default_config()[section], section))
        # A value taken from another setting comes last: that one is to be named.
        for path in sorted(found, key=lambda path: OmegaConf.is_interpolation(*_node_and_key(run.config, path))):
            raise ValueError(f"{run.key(path)}={run.get(path)!r} {found[path]}")


@functools.cache
def default_config() -> dict[str, Any]:
    """verl's own configuration with nothing overridden, as it ships it in one file."""
    file = importlib.resources.files("verl.trainer.config") / "_generated_ppo_trainer.yaml"
    return cast(dict, OmegaConf.to_container(OmegaConf.create(file.read_text()), resolve=True))


def check_ignored(run: Run) -> Iterator[str]:
    """Say what verl does not read, of its own settings and of what one would expect of AsyPPO's."""
    for key, instead in IGNORED.items():
        given, default = run.get(key), default_config()["critic"][key.removeprefix("critic.")]
        if given != default and given != run.get(instead):
            yield f"{key}={given} is not read by verl; set {instead}"
    yield from _moved(run)
    if run.get(f"{CORRECTION}.bypass_mode"):
        yield from _bypassed(run)
    lam, asyppo = run.config.algorithm.lam, run.asyppo
    if asyppo.num_critics == 1 and asyppo.critic_lam != lam:
        yield (
            f"asyppo.num_critics=1 with asyppo.critic_lam={asyppo.critic_lam} is not verl's PPO, whose critic learns with "
            f"algorithm.lam={lam}; for that set +asyppo.critic_lam={lam}"
        )


def _moved(run: Run) -> Iterator[str]:
    """What is set below nodes that verl has moved."""
    for node in MOVED:
        given, defaults = run.get(node), default_config()[node]
        for key in given if OmegaConf.is_dict(given) else ():
            if given[key] != defaults.get(key):
                yield f"{node}.{key} is not read by verl any more; what replaces it stands below reward"


def _bypassed(run: Run) -> Iterator[str]:
    """What is set for the rollout's correction, and not where the loss of bypass mode reads it."""
    has_loss = run.get(f"{LOSS}.loss_mode") == "bypass_mode"
    for key, default in default_config()["algorithm"]["rollout_correction"].items():
        given = run.get(f"{CORRECTION}.{key}")
        is_read = has_loss and run.get(f"{LOSS}.rollout_correction.{key}") == given
        if key != "bypass_mode" and given != default and not is_read:
            yield (
                f"{CORRECTION}.{key}={given} is not read by verl with bypass_mode=True; set {LOSS}.loss_mode=bypass_mode and "
                f"+{LOSS}.rollout_correction.{key}={given}"
            )


def _misfits(given: Mapping, defaults: Mapping, prefix: str) -> Iterator[tuple[str, str]]:
    """Key and what it must be, for each value that cannot be what verl's default is."""
    for key in (key for key in defaults if key in given):
        path, value, default = f"{prefix}.{key}", given[key], defaults[key]
        if isinstance(default, Mapping) and isinstance(value, Mapping):
            yield from _misfits(value, default, path)
        elif isinstance(default, Mapping) and value is not None:
            yield path, "must be a group of settings; set single keys of it, or remove the override"
        elif isinstance(default, bool) and isinstance(value, str) and value.lower() not in TRUE_TEXTS:
            yield path, "must be True or False"
        elif type(default) in (int, float) and (isinstance(value, str) or value != value) and path not in ALSO_TEXT:
            yield path, "must be a number"


def _node_and_key(config: DictConfig, path: str) -> tuple[DictConfig, str]:
    parent, _, key = path.rpartition(".")
    return OmegaConf.select(config, parent), key


def check_values(run: Run) -> Iterator[str]:
    """Refuse numbers out of range, sampling settings included, which vLLM looks at with its first request."""
    rules = dict(RULES)
    for optim in ("actor_rollout_ref.actor.optim", "critic.optim"):
        if run.get(f"{optim}.grad_clip") is not None:  # its former name, which verl lets win
            rules[f"{optim}.grad_clip"] = rules.pop(f"{optim}.clip_grad")
    if run.config.actor_rollout_ref.actor.strategy == "megatron":
        rules.pop("actor_rollout_ref.actor.optim.clip_grad", None)  # 0 is no bound there
    rollout = "actor_rollout_ref.rollout"
    validates = run.get("trainer.val_before_train") or (run.get("trainer.test_freq") or 0) > 0
    for node in (rollout, f"{rollout}.val_kwargs") if validates else (rollout,):
        rules |= {f"{node}.{key}": rule for key, rule in SAMPLING.items()}
    for key, (wanted, holds) in rules.items():
        if not holds(value := run.get(key)):
            raise ValueError(f"{run.key(key)}={value!r} {wanted}")
    if run.config.actor_rollout_ref.rollout.temperature == 0:
        yield f"{rollout}.temperature=0: all responses of a prompt will be equal, and their entropy 0"


def check_batches(run: Run) -> None:
    """Refuse mini-batches that the critics' ranks cannot divide, and token budgets that the longest row exceeds."""
    critic, n = run.config.critic, run.config.actor_rollout_ref.rollout.n
    mini_batch, micro_batch, infer = critic.ppo_mini_batch_size, 1, None
    if critic.use_dynamic_bsz:
        _check_tokens(run)
    else:
        micro_batch = critic.ppo_micro_batch_size_per_gpu
        infer_key = "ppo_infer_micro_batch_size_per_gpu"
        infer_key = infer_key if critic.get(infer_key) else "forward_micro_batch_size_per_gpu"
        infer = critic.get(infer_key)
        if not is_count(micro_batch):
            raise ValueError(
                f"{run.key('critic.ppo_micro_batch_size_per_gpu')}={micro_batch!r} must be a whole number, 1 or more, while "
                f"{run.key('critic.use_dynamic_bsz')}=False; set it, or use_dynamic_bsz=True"
            )
    # Several critics' training calls are filled up to what ranks and micro-batches want.
    responses, unit = mini_batch * n, micro_batch if run.asyppo.num_critics == 1 else 1
    data_parallel = critic_ranks(run) // critic.fsdp.ulysses_sequence_parallel_size
    if responses % (unit * data_parallel):
        raise ValueError(
            f"critic.ppo_mini_batch_size={mini_batch} prompts x rollout.n={n} = {responses} responses cannot be cut into "
            f"{data_parallel} data-parallel ranks ({ranks_key(run.asyppo)})"
            + ("" if unit == 1 else f" x {run.key('critic.ppo_micro_batch_size_per_gpu')}={micro_batch}")
            + f"; make the product of the first two a multiple of {unit * data_parallel}"
        )
    if infer is not None and (not is_count(infer) or responses % (data_parallel * infer)):
        raise ValueError(
            f"{run.key(f'critic.{infer_key}')}={infer} does not divide the {responses} responses of a critic mini-batch on "
            f"{data_parallel} data-parallel ranks; choose a divisor of {responses // data_parallel}"
        )


def _check_tokens(run: Run) -> None:
    """verl stops at the first row that does not fit, which may come after hours."""
    from verl.trainer.ppo import padding_utils

    critic, rollout = run.config.critic, run.config.actor_rollout_ref.rollout
    # verl fills up a batch that mini-batches do not divide, and we several critics' training calls, with rows of one length
    # (in verl 0.9.0 of two tokens).
    filler = getattr(padding_utils, "SYNTHETIC_PADDING_SEQ_LEN", 2)
    mini_batches = critic.ppo_mini_batch_size, run.config.actor_rollout_ref.actor.ppo_mini_batch_size
    is_filled = run.config.data.train_batch_size % math.lcm(*mini_batches) != 0
    infer = "ppo_infer_max_token_len_per_gpu"  # not in verl's node, but goes first where it has been added
    for key in ("ppo_max_token_len_per_gpu", infer if critic.get(infer) else "forward_max_token_len_per_gpu"):
        has_fillers = is_filled or (run.asyppo.num_critics > 1 and key == "ppo_max_token_len_per_gpu")
        longest = max(rollout.prompt_length + rollout.response_length, filler * has_fillers)
        if not is_count(critic[key]) or critic[key] * critic.fsdp.ulysses_sequence_parallel_size < longest:
            raise ValueError(
                f"{run.key(f'critic.{key}')}={critic[key]!r} must have room for a row of rollout.prompt_length + "
                f"rollout.response_length tokens, and for verl's padding rows; raise it to {longest} or more"
            )

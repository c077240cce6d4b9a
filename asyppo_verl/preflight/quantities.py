"""Numbers of verl's configuration that nothing checks before a run has been going for a minute, or for hours."""

import math
from collections.abc import Callable
from typing import Any


def is_whole(value: Any) -> bool:
    """True for a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """True for a whole number of at least 1."""
    return is_whole(value) and value >= 1


def is_number(value: Any) -> bool:
    """True for a whole or decimal number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """True for a number that is neither infinite nor nan."""
    return is_number(value) and math.isfinite(value)


Rule = tuple[str, Callable[[Any], bool]]
"""What a value must be, in words, and whether one is."""

COUNT: Rule = ("must be a whole number, 1 or more", is_count)
COUNT_OR_NULL: Rule = ("must be a whole number, 1 or more, or null", lambda value: value is None or is_count(value))
KEPT: Rule = (f"{COUNT_OR_NULL[0]} to keep all", COUNT_OR_NULL[1])
WHOLE: Rule = ("must be a whole number", is_whole)
WHOLE_OR_NULL: Rule = ("must be a whole number, or null", lambda value: value is None or is_whole(value))
SHARE: Rule = ("must be a number in [0, 1]", lambda value: is_number(value) and 0 <= value <= 1)
RATE: Rule = ("must be a finite number, 0 or more", lambda value: is_finite(value) and value >= 0)
WIDTH: Rule = ("must be a finite number above 0", lambda value: is_finite(value) and value > 0)
BOUND: Rule = ("must be a number above 0; .inf for no bound", lambda value: is_number(value) and value > 0)

RULES = {
    "actor_rollout_ref.rollout.n": COUNT,
    "actor_rollout_ref.actor.ppo_mini_batch_size": COUNT,
    "actor_rollout_ref.actor.ppo_epochs": COUNT,
    "actor_rollout_ref.actor.entropy_coeff": RATE,
    "actor_rollout_ref.actor.optim.lr": RATE,
    "actor_rollout_ref.actor.optim.clip_grad": BOUND,
    "algorithm.gamma": SHARE,
    "algorithm.lam": SHARE,
    "critic.ppo_mini_batch_size": COUNT,
    "critic.ppo_epochs": COUNT,
    "critic.fsdp.ulysses_sequence_parallel_size": COUNT,
    "critic.cliprange_value": WIDTH,
    "data.train_batch_size": COUNT,
    "data.gen_batch_size": COUNT_OR_NULL,
    "data.max_prompt_length": COUNT,
    "data.max_response_length": COUNT,
    "trainer.nnodes": COUNT,
    "trainer.n_gpus_per_node": COUNT,
    "trainer.total_training_steps": WHOLE_OR_NULL,
    "trainer.save_freq": WHOLE,
    "trainer.test_freq": WHOLE,
    "trainer.max_actor_ckpt_to_keep": KEPT,
    "trainer.max_critic_ckpt_to_keep": KEPT,
}

CRITIC_RULES = {
    "optim.lr": RATE,
    "optim.clip_grad": BOUND,
    "fsdp.fsdp_size": ("must be a whole number of GPUs, or -1 for all of them", is_whole),
    "model.lora_rank": WHOLE,
}
"""The same for every mini-critic, below its ``critic`` node."""


def check_numbers(config: Any) -> None:
    """Raises ValueError naming key, value and what would do."""
    for key, (cure, holds) in RULES.items():
        value = _value(config, key)
        _require(key, value, holds(value), cure)


def check_critic_numbers(critic: Any, name: Callable[[str], str], longest: int) -> None:
    """The same for the ``critic`` node of one mini-critic.

    Args:
        critic: the node.
        name: what to call one of its keys in a message.
        longest: tokens of the longest row, prompt and response.
    """
    for key, (cure, holds) in CRITIC_RULES.items():
        value = _value(critic, key)
        _require(name(key), value, holds(value), cure)
    if critic.use_dynamic_bsz:
        # verl stops at the first row that does not fit, which may come hours into a run.
        infer = "ppo_infer_max_token_len_per_gpu"  # not in verl's node, but goes first where it has been added
        for key in ("ppo_max_token_len_per_gpu", infer if critic.get(infer) else "forward_max_token_len_per_gpu"):
            fits = is_count(critic[key]) and critic[key] * critic.fsdp.ulysses_sequence_parallel_size >= longest
            cure = f"must have room for a row of data.max_prompt_length + data.max_response_length = {longest} tokens"
            _require(name(key), critic[key], fits, f"{cure}; raise it to {longest} or more")
        return
    key = "ppo_micro_batch_size_per_gpu"
    switch = name("use_dynamic_bsz")
    cure = f"{COUNT[0]}, while {switch}=False; set it, or {switch.removeprefix('critic.')}=True"
    _require(name(key), critic[key], is_count(critic[key]), cure)
    for key in ("forward_micro_batch_size_per_gpu", "ppo_infer_micro_batch_size_per_gpu"):
        value = critic.get(key)
        _require(name(key), value, COUNT_OR_NULL[1](value), COUNT_OR_NULL[0])


def _require(key: str, value: Any, holds: bool, cure: str) -> None:
    if not holds:
        raise ValueError(f"{key}={value!r} {cure}")


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config

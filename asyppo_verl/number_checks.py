"""Numbers of verl's configuration that nothing checks before a run has been going for a minute, or for hours."""

from typing import Any

COUNTS = (
    "actor_rollout_ref.rollout.n",
    "critic.ppo_mini_batch_size",
    "critic.ppo_epochs",
    "critic.fsdp.ulysses_sequence_parallel_size",
    "data.train_batch_size",
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
)
"""Settings that must be 1 or more."""

KEPT = ("trainer.max_actor_ckpt_to_keep", "trainer.max_critic_ckpt_to_keep")
"""Settings that may be null, for all."""


def check_numbers(config: Any) -> None:
    """Raises ValueError naming key, value and what would do."""
    for key in COUNTS:
        _require(key, _value(config, key), is_count(_value(config, key)), "must be a whole number, 1 or more")
    for key in KEPT:
        value = _value(config, key)
        _require(key, value, value is None or is_count(value), "must be a whole number, 1 or more, or null to keep all")
    clip = config.critic.cliprange_value
    _require("critic.cliprange_value", clip, is_number(clip) and clip > 0, "must be a number above 0")


def check_critic_numbers(key: str, critic: Any, longest: int) -> None:
    """The same for the ``critic`` node of one mini-critic.

    Args:
        key: what to call the node in a message, such as "critic".
        critic: the node.
        longest: tokens of the longest row, prompt and response.
    """
    lr = critic.optim.lr
    _require(f"{key}.optim.lr", lr, is_number(lr) and lr >= 0, "must be a number, 0 or more")
    if critic.use_dynamic_bsz:
        for name in ("ppo_max_token_len_per_gpu", "forward_max_token_len_per_gpu"):
            # verl stops at the first row that does not fit, which may come hours into a run.
            fits = is_count(critic[name]) and critic[name] * critic.fsdp.ulysses_sequence_parallel_size >= longest
            cure = f"must have room for a row of data.max_prompt_length + data.max_response_length = {longest} tokens"
            _require(f"{key}.{name}", critic[name], fits, f"{cure}; raise it to {longest} or more")
        return
    name = "ppo_micro_batch_size_per_gpu"
    cure = f"must be a whole number, 1 or more, while {key}.use_dynamic_bsz=False; set it, or use_dynamic_bsz=True"
    _require(f"{key}.{name}", critic[name], is_count(critic[name]), cure)
    name = "forward_micro_batch_size_per_gpu"
    forward = critic.get(name)
    _require(f"{key}.{name}", forward, forward is None or is_count(forward), "must be a whole number, 1 or more")


def is_count(value: Any) -> bool:
    """True for a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> bool:
    """True for a whole or decimal number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(key: str, value: Any, holds: bool, cure: str) -> None:
    if not holds:
        raise ValueError(f"{key}={value!r} {cure}")


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config

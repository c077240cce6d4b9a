"""A replay buffer that looks for finished rollouts more often than every 2 s, for steps that take about that long.

Used as ``trainer.v1.sampler.custom_sampler.path=pkg://asyppo_verl.cpu.sampler``; verl has no setting for the interval.
"""

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

POLL_SECONDS = 0.05


class QuickReplayBuffer(ReplayBuffer):
    """verl's synchronous replay buffer with a short polling interval."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, poll_interval=POLL_SECONDS)

"""The plan of one algorithm, and what to change where it does not fit."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from recipe.asyppo.plan import cost, memory
from recipe.asyppo.plan.settings import GIB, Settings

TOKENS = {
    # the token budget that a phase's working memory grows with, and the sequence parallelism that splits a sequence
    "old log-probs": ("log_prob_tokens", "actor_sp"),
    "reference": ("log_prob_tokens", "actor_sp"),
    "values": ("value_tokens", "critic_sp"),
    "critic update": ("critic_tokens", "critic_sp"),
    "actor update": ("actor_tokens", "actor_sp"),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One algorithm under given settings."""

    settings: Settings
    algorithm: str

    @property
    def phases(self) -> list[memory.Phase]:
        return memory.phases(self.settings, self.algorithm)

    @property
    def tightest(self) -> memory.Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def cache_too_small(self) -> bool:
        """Whether vLLM could not hold one sequence of the greatest length."""
        return memory.cache_tokens(self.settings) < self.settings.longest

    @property
    def fits(self) -> bool:
        room = self.settings.machine.memory - self.settings.reserve
        return self.tightest.total <= room * GIB and not self.cache_too_small

    def summary(self) -> dict[str, Any]:
        """All figures: GiB, petaFLOP, seconds, shares."""
        models = [self.settings.actor, *self.settings.critics(self.algorithm)]
        actor, *critics = (memory.states(model, self.settings) / GIB for model in models)
        work, seconds = cost.work(self.settings, self.algorithm), cost.seconds(self.settings, self.algorithm)
        phases = {phase.name: dataclasses.asdict(phase) | {"total": phase.total} for phase in self.phases}
        return {
            "states_gib": {"actor": actor, "critics": sum(critics)},
            "phases_gib": {
                name: {part: size / GIB for part, size in parts.items() if part != "name"}
                for name, parts in phases.items()
            },
            "tightest": self.tightest.name,
            "peak_gib": self.tightest.total / GIB,
            "fits": self.fits,
            "host_gib_per_node": memory.host_memory(self.settings, self.algorithm) / GIB,
            "cache_tokens": memory.cache_tokens(self.settings),
            "petaflop": {name: flops / 1e15 for name, flops in work.items()},
            "seconds_estimate": seconds,
            "critic_share_of_training_work": cost.critic_share(work),
            "critic_share_of_step_estimate": cost.critic_share(seconds),
        }


def fix(plan: Plan) -> dict[str, Any] | None:
    """Changes of settings, found one after the other, with which the plan fits; None if none of those known is enough."""
    changes: dict[str, Any] = {}
    tried = [plan.settings]  # one change may undo another
    while not plan.fits:
        for change in _fixes(plan):
            settings = dataclasses.replace(plan.settings, **change)
            if settings not in tried:
                break
        else:
            return None
        changes |= change
        tried.append(settings)
        plan = Plan(settings, plan.algorithm)
    return changes


def _fixes(plan: Plan) -> Iterator[dict[str, Any]]:
    """Single changes that relieve the tightest phase, the cheapest first."""
    settings, phase = plan.settings, plan.tightest
    share = settings.gpu_memory_utilization
    if plan.cache_too_small:
        if share < 0.8:
            yield {"gpu_memory_utilization": round(share + 0.1, 2)}
        yield from _double(settings, "tensor_parallel")
        return
    if phase.name == "rollout":
        if share > 0.5:
            yield {"gpu_memory_utilization": round(share - 0.05, 2)}
    else:
        budget, ranks = TOKENS[phase.name]
        if phase.name == "critic update":
            budget = memory.update_budget(plan.algorithm)
        least = -(-settings.longest // getattr(settings, ranks))
        if getattr(settings, budget) > least:
            yield {budget: max(least, getattr(settings, budget) // 2)}
    if phase.critics and not settings.critic_offload:
        yield {"critic_offload": True}
    if phase.actor and not settings.actor_offload and phase.name != "actor update":
        yield {"actor_offload": True}
    if phase.name in TOKENS:
        yield from _double(settings, TOKENS[phase.name][1])
    elif share > 0.2:
        yield {"gpu_memory_utilization": round(share - 0.05, 2)}


def _double(settings: Settings, name: str) -> Iterator[dict[str, Any]]:
    """Twice the parallelism, where the settings allow it."""
    change = {name: 2 * getattr(settings, name)}
    try:
        dataclasses.replace(settings, **change)
    except ValueError:
        return
    yield change

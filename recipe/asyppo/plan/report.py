"""A plan as text: one column an algorithm."""

from typing import Any

from recipe.asyppo.plan import cost, memory
from recipe.asyppo.plan.plan import Plan, fix
from recipe.asyppo.plan.settings import ALGORITHMS, GIB, Settings


def plans(settings: Settings) -> dict[str, Plan]:
    return {algorithm: Plan(settings, algorithm) for algorithm in ALGORITHMS}


def table(settings: Settings) -> str:
    """Memory, work and time of the four algorithms side by side, and what to change where one does not fit."""
    found = {algorithm: plan.summary() for algorithm, plan in plans(settings).items()}
    memory_limit = settings.machine.memory
    lines = [
        f"{settings.nodes} x {settings.gpus} {settings.hardware} with {memory_limit:.1f} GiB; "
        f"{settings.prompts} prompts x {settings.responses} responses of at most "
        f"{settings.prompt_length} + {settings.response_length} tokens, {settings.mean_length} on average",
        f"actor {_model(settings.actor)}; critics: asyppo {settings.num_critics} x {_model(settings.critic)}, "
        f"ppo_small_critic 1, ppo {_model(settings.actor.as_critic())}, grpo none",
        "",
        _row("", ALGORITHMS),
        "GiB of a GPU",
        *(_figures(f"  states of the {name}", found, ("states_gib", name)) for name in ("actor", "critics")),
        *(_figures(f"  {name}", found, ("phases_gib", name, "total")) for name in _names(found, "phases_gib")),
        _row(f"  fits, with {settings.reserve:g} in reserve", ["yes" if s["fits"] else "NO" for s in found.values()]),
        _figures("GiB of a node's host memory", found, ("host_gib_per_node",)),
        "petaFLOP of a step",
        *(_figures(f"  {name}", found, ("petaflop", name)) for name in _names(found, "petaflop")),
        _figures("critics' share of it", found, ("critic_share_of_training_work",), "{:.2f}"),
        "seconds of a step (estimates)",
        *(_figures(f"  {name}", found, ("seconds_estimate", name)) for name in _names(found, "seconds_estimate")),
        _row("  all", [f"{sum(s['seconds_estimate'].values()):.0f}" for s in found.values()]),
        _figures("critics' share of it", found, ("critic_share_of_step_estimate",), "{:.2f}"),
        "",
        _rollout(settings),
        *(_verdict(plan) for plan in plans(settings).values()),
    ]
    return "\n".join(lines)


def explanation(settings: Settings) -> str:
    """The assumptions, and what every phase of asyppo holds."""
    lines = ["", "Assumptions", *(f"  - {line}" for line in (*memory.ASSUMPTIONS, *cost.ASSUMPTIONS)), ""]
    for name, parts in Plan(settings, "asyppo").summary()["phases_gib"].items():
        lines.append(f"{name:<14} " + "  ".join(f"{part} {size:.1f}" for part, size in parts.items()))
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    phase, limit = plan.tightest, plan.settings.machine.memory - plan.settings.reserve
    name = f"{plan.algorithm}: "
    if plan.fits:
        return f"{name}fits; the tightest phase is {phase.name}, {phase.total / GIB:.1f} of {limit:.1f} GiB"
    why = f"does not fit: {phase.name} needs {phase.total / GIB:.1f} of {limit:.1f} GiB"
    if plan.cache_too_small:
        why = f"does not fit: vLLM's cache holds {max(memory.cache_tokens(plan.settings), 0)} tokens, less than one sequence"
    changes = fix(plan)
    if changes is None:
        return f"{name}{why}; use more GPUs (--nodes), or GPUs with more memory"
    return f"{name}{why}; it fits with " + " ".join(_option(*change) for change in changes.items())


def _option(name: str, value: Any) -> str:
    flag = "--" + name.replace("_", "-")
    return flag if value is True else f"{flag} {value}"


def _rollout(settings: Settings) -> str:
    longest = max(memory.cache_tokens(settings), 0) // settings.longest
    queued = settings.sequences * settings.tensor_parallel // settings.world
    return (
        f"rollout: a vLLM replica on {settings.tensor_parallel} GPU(s) has {queued} responses to write; its cache holds "
        f"{longest} of the greatest length, or {max(memory.cache_tokens(settings), 0) // settings.mean_length} of mean length"
    )


def _model(model: Any) -> str:
    return f"{model.name} ({model.params:,} parameters)"


def _names(found: dict[str, Any], key: str) -> list[str]:
    return list(found["asyppo"][key])


def _figures(label: str, found: dict[str, Any], path: tuple[str, ...], form: str = "{:.1f}") -> str:
    cells = []
    for value in found.values():
        for key in path:
            value = value.get(key) if value is not None else None
        cells.append("-" if value is None else form.format(value))
    return _row(label, cells)


def _row(label: str, cells: Any) -> str:
    return f"{label:<34}" + "".join(f"{cell:>18}" for cell in cells)

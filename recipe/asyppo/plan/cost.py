"""Work and time of a step: floating-point operations counted exactly, seconds estimated from the GPU's peak figures."""

from recipe.asyppo.plan.memory import COMPUTE, cache_tokens
from recipe.asyppo.plan.settings import Settings

CRITIC_PARTS = ("values", "critic update")

ASSUMPTIONS = (
    "Work: 2 operations a matrix element and token in a forward, 4 in a backward, 2 more for the layers' recomputation "
    "(not for the last matrix of each); attention apart (backward 2.5 x forward). The input embedding is a look-up.",
    "Every sequence has the mean length; a spread of lengths raises the attention part.",
    "A mini-critic evaluates every response, and trains on 1/M of them in each epoch.",
    "Seconds of training = operations / (GPUs x peak x mfu), the same mfu for all models; small ones reach less.",
    "Seconds of generation are a rough estimate: weights are read once a decoding step, every token's cache at half of its "
    "final length on average; a step takes at least as many decoding steps as the longest response has tokens.",
)


def work(settings: Settings, algorithm: str) -> dict[str, float]:
    """Operations of a step of all GPUs together, by phase."""
    tokens = settings.sequences * settings.mean_length
    squares = settings.sequences * settings.mean_length**2
    actor, critics = settings.actor, settings.critics(algorithm)
    share = 1 / max(len(critics), 1)
    parts = {"old log-probs": actor.forward_flops(tokens, squares)}
    if settings.reference:
        parts["reference"] = parts["old log-probs"]
    if critics:
        parts["values"] = sum(critic.forward_flops(tokens, squares) for critic in critics)
        once = sum(critic.training_flops(tokens * share, squares * share) for critic in critics)
        parts["critic update"] = settings.critic_epochs * once
    parts["actor update"] = settings.actor_epochs * actor.training_flops(tokens, squares)
    return parts


def critic_share(parts: dict[str, float]) -> float:
    """The critics' share of the work, or of the seconds, of a step."""
    return sum(parts.get(name, 0.0) for name in CRITIC_PARTS) / sum(parts.values())


def seconds(settings: Settings, algorithm: str) -> dict[str, float]:
    """Estimated seconds of a step, by phase, generation first."""
    speed = settings.world * settings.machine.flops * settings.mfu
    return {"generation": _generation(settings)} | {
        name: flops / speed for name, flops in work(settings, algorithm).items()
    }


def _generation(settings: Settings) -> float:
    """Decoding is bound by memory: weights and caches are read at ``bandwidth_use`` of the bandwidth of a replica's GPUs."""
    actor, split = settings.actor, settings.tensor_parallel
    bandwidth = settings.machine.bandwidth * settings.bandwidth_use * split
    sequences = settings.sequences * split / settings.world
    at_once = max(1.0, min(sequences, settings.max_num_seqs, cache_tokens(settings) / settings.mean_length))
    steps = max(settings.response_length, sequences / at_once * settings.mean_response_length)
    context = settings.mean_prompt_length + settings.mean_response_length / 2
    cache = sequences * settings.mean_response_length * context * actor.kv_bytes
    return (steps * COMPUTE * actor.params + cache) / bandwidth

"""Work and time of a step: floating-point operations counted exactly, seconds estimated from the GPU's peak figures."""

import dataclasses

from recipe.asyppo.plan.memory import COMPUTE, cache_tokens
from recipe.asyppo.plan.model import Model
from recipe.asyppo.plan.settings import Settings

CRITIC_PARTS = ("values", "critic update")

TRAFFIC = {
    "verl": {"forward": 112, "training": 520},
    "packed": {"forward": 75, "training": 370},
    "compiled": {"forward": 15, "training": 115},
}
"""Bytes a token, layer and unit of width that norms, rotary embedding, activations and residuals move: small models, whose
matrix products are short, wait for them. As verl builds models; mini-critics, which look for the bounds of packed sequences
once a micro-batch; mini-critics whose layers are compiled."""

ASSUMPTIONS = (
    "Work: 2 operations a matrix element and token in a forward, 4 in a backward, 2 more for the layers' recomputation "
    "(not for the last matrix of each); attention apart (backward 2.5 x forward). The input embedding is a look-up.",
    "Every sequence has the mean length; a spread of lengths raises the attention part.",
    "A mini-critic evaluates every response, and trains on 1/M of them in each epoch.",
    "Seconds of training = matrix products at matrix_use of the peak + attention at attention_use of it + memory traffic of "
    "what goes element by element, a layer and token, for each of hidden + MLP + query + key: 112 bytes in a forward and 520 in "
    "an update as verl builds models, 15 and 115 in compiled mini-critics (75 and 370 where they are not). Fitted to 0.6B, 1.7B "
    "and 4B on one H200 (benchmarks/plan_error.py). Communication is taken as hidden. Left out is what "
    "a call takes whatever the batch, 0.2 s for an evaluation of few tokens there and 0.4 s for an update of small critics.",
    "Seconds of generation are a rough estimate: weights are read once a decoding step, every token's cache at half of its "
    "final length on average; a step takes at least as many decoding steps as the longest response has tokens.",
)


@dataclasses.dataclass(frozen=True)
class Pass:
    """A model going over the batch, or over a part of it, or over it several times."""

    model: Model
    kind: str
    """``forward`` or ``training``"""
    times: float
    built: str = "verl"
    """A key of :data:`TRAFFIC`."""

    def flops(self, tokens: float, squares: float) -> float:
        """Operations; see :class:`Model` for the arguments, which are those of the batch."""
        count = self.model.forward_flops if self.kind == "forward" else self.model.training_flops
        return self.times * count(tokens, squares)

    def seconds(self, tokens: float, squares: float, settings: Settings) -> float:
        """Estimate for one GPU."""
        machine, model = settings.machine, self.model
        products = self.flops(tokens, 0) / settings.matrix_use + self.flops(0, squares) / settings.attention_use
        width = model.hidden + model.intermediate + model.query + model.key
        moved = self.times * tokens * model.layers * width * TRAFFIC[self.built][self.kind]
        return products / machine.flops + moved / machine.bandwidth


def passes(settings: Settings, algorithm: str) -> dict[str, list[Pass]]:
    """What goes over the batch in each phase of a step, generation apart."""
    actor, critics = settings.actor, settings.critics(algorithm)
    found = {"old log-probs": [Pass(actor, "forward", 1)]}
    if settings.reference:
        found["reference"] = found["old log-probs"]
    if critics:
        built = settings.built(algorithm)
        evaluations = 1 + (settings.update_critics_first and algorithm == "asyppo")
        found["values"] = [Pass(critic, "forward", evaluations, built) for critic in critics]
        times = settings.critic_epochs / len(critics)
        found["critic update"] = [Pass(critic, "training", times, built) for critic in critics]
    found["actor update"] = [Pass(actor, "training", settings.actor_epochs)]
    return found


def _batch(settings: Settings) -> tuple[int, int]:
    """Tokens of the batch, and the sum of its squared lengths."""
    return settings.sequences * settings.mean_length, settings.sequences * settings.mean_length**2


def work(settings: Settings, algorithm: str) -> dict[str, float]:
    """Operations of a step of all GPUs together, by phase."""
    batch = _batch(settings)
    return {name: sum(each.flops(*batch) for each in phase) for name, phase in passes(settings, algorithm).items()}


def critic_share(parts: dict[str, float]) -> float:
    """The critics' share of the work, or of the seconds, of a step."""
    return sum(parts.get(name, 0.0) for name in CRITIC_PARTS) / sum(parts.values())


def seconds(settings: Settings, algorithm: str) -> dict[str, float]:
    """Estimated seconds of a step, by phase, generation first."""
    batch = _batch(settings)
    return {"generation": _generation(settings)} | {
        name: sum(each.seconds(*batch, settings) for each in phase) / settings.world
        for name, phase in passes(settings, algorithm).items()
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

"""Memory of a GPU through a step of verl's colocated trainer with FSDP2, phase by phase.

Read from verl 0.9.1 and torch 2.13, or measured on a CPU with the real models and verl's entropy functions. On an H200 the
trainer's peaks in two short runs were 2 % above the plan, those of critics by themselves up to 12 % below (docs/performance.md).
``ASSUMPTIONS`` states it line by line.
"""

import dataclasses

from recipe.asyppo.plan.model import Model
from recipe.asyppo.plan.settings import GIB, Settings

MOMENTS = 2
MASTER, GRADIENT, ADAM, COMPUTE, REDUCE = 4, 4, 4 * MOMENTS, 2, 4
"""Bytes of a parameter: float32 master copy, its gradient, two Adam moments; bf16 for compute, float32 when reduced."""

LOGIT = 2
"""Bytes of one of the actor's logits, in bf16; the log-probability's gradient is as large."""

ENTROPY_UPDATE, ENTROPY_FORWARD = {False: 4, True: 8}, {False: 4, True: 0}
"""What verl's compiled entropy takes beside a logit, without and with entropy_from_logits_with_chunking."""

VLLM_OVERHEAD = 3 * GIB
"""What vLLM needs beside weights and cache: CUDA graphs, its largest prefill."""

ASSUMPTIONS = (
    "FSDP2: float32 weights, gradients and Adam moments (4 + 4 + 8 bytes a parameter) shared among fsdp_size GPUs.",
    "Gradients exist only during an update; they are reduced after every micro-batch (verl's default).",
    "Two layers are gathered in bf16 at a time, the next one ahead; in backward their gradients too, one reduced in float32.",
    "A tied embedding stays gathered through a pass, and its gradient through backward; an untied one comes and goes.",
    "Gradient checkpointing, flash attention without padding: 2 x hidden bytes a token and layer are kept.",
    "The layer at work takes 18 x hidden + 12 x MLP + 10.5 x (query + key) bytes a token in backward, 8 x MLP + 4 x hidden "
    "in a forward without gradient.",
    "An actor logit takes 2 bytes, and 2 for the gradient of flash-attn's cross entropy; verl's entropy under torch.compile "
    "4 more, with chunking 8 in the update and none in a forward. entropy_checkpointing changes no peak. A critic has no "
    "logits.",
    "Every micro-batch is as large as its token budget.",
    "AdamW on sharded tensors goes parameter by parameter and needs no second copy.",
    "With offload, weights and moments of a model are on the GPU only while it works; a mini-critic at a time.",
    "On the host they are pinned: torch takes the next power of two for the shard of every parameter, and for each moment.",
    "The reference lives on the host (verl forces it), and is streamed layer by layer.",
    "vLLM takes gpu_memory_utilization of the GPU in the rollout and nothing after it, beyond what the reserve covers.",
    "Weights go to vLLM before it takes its cache, so that this moment is below the rollout's.",
)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a step and the bytes it holds on a GPU at its fullest moment."""

    name: str
    actor: float = 0.0
    critics: float = 0.0
    vllm: float = 0.0
    working: float = 0.0
    """Gathered weights and gradients, activations, logits."""

    @property
    def total(self) -> float:
        return self.actor + self.critics + self.vllm + self.working


def ranks(size: int, settings: Settings) -> int:
    """GPUs that share a model's states, of ``fsdp_size``."""
    return settings.world if size < 0 else min(size, settings.world)


def shard(params: int, size: int, settings: Settings) -> float:
    """Parameters of a model on one GPU."""
    return params / ranks(size, settings)


def states(model: Model, settings: Settings) -> float:
    """Bytes a GPU of weights, gradients and moments of a model while it is updated."""
    size = settings.critic_fsdp_size if model.value_head else settings.actor_fsdp_size
    return (MASTER + GRADIENT + ADAM) * shard(model.params, size, settings)


def _held(model: Model, settings: Settings, state: str) -> float:
    """Bytes a GPU of a model's states in the state ``idle``, ``forward`` or ``update``."""
    size = settings.critic_fsdp_size if model.value_head else settings.actor_fsdp_size
    offload = settings.critic_offload if model.value_head else settings.actor_offload
    idle = 0 if offload else MASTER + ADAM
    each = {"idle": idle, "forward": idle or MASTER, "update": MASTER + GRADIENT + ADAM}[state]
    return each * shard(model.params, size, settings)


def forward_working(model: Model, tokens: int, entropy: int = 0) -> float:
    """Bytes of a forward pass without gradient over one micro-batch, beside the states; ``entropy`` a logit on top."""
    layer = tokens * (8 * model.intermediate + 4 * model.hidden)
    root = model.embedding if model.tied else 0
    if model.value_head:
        return COMPUTE * (root + 2 * model.layer) + layer
    logits = tokens * (model.vocab * (LOGIT + entropy) + 2 * model.hidden)
    return max(COMPUTE * (root + 2 * model.layer) + layer, COMPUTE * model.embedding + logits)


def update_working(model: Model, tokens: int, entropy: int = 0) -> float:
    """Bytes of forward and backward over one micro-batch, beside the states: the fullest of three moments."""
    kept = tokens * 2 * model.hidden * model.layers
    layer = tokens * (18 * model.hidden + 12 * model.intermediate + 10.5 * (model.query + model.key))
    root = COMPUTE * model.embedding if model.tied else 0
    root_gradient = root if not model.value_head else 0
    logits = tokens * model.vocab * (2 * LOGIT + entropy)
    at_logits = 0 if model.value_head else kept + logits + 2 * COMPUTE * model.embedding
    in_layer = kept + layer + root + root_gradient + (2 * COMPUTE + COMPUTE + REDUCE) * model.layer
    if not model.tied and not model.value_head:
        in_layer += REDUCE * model.embedding
    at_embedding = (2 * COMPUTE + REDUCE) * model.embedding
    return max(at_logits, in_layer, at_embedding)


def update_budget(algorithm: str) -> str:
    """The setting with the tokens of a critic's update: verl's own V1 trainer takes the one for values."""
    return "critic_tokens" if algorithm == "asyppo" else "value_tokens"


def phases(settings: Settings, algorithm: str) -> list[Phase]:
    """The phases of a step in their order."""
    actor, critics = settings.actor, settings.critics(algorithm)
    actor_idle = _held(actor, settings, "idle")
    critics_idle = sum(_held(critic, settings, "idle") for critic in critics)

    def during(state: str, working: str, tokens: int) -> dict[str, float]:
        """The most that a critic in ``state`` holds beside the idle others, and the most that one works with."""
        peak = {"forward": forward_working, "update": update_working}[working]
        held = max(critics_idle - _held(c, settings, "idle") + _held(c, settings, state) for c in critics)
        return {"critics": held, "working": max(peak(critic, tokens) for critic in critics)}

    log_probs = forward_working(actor, settings.log_prob_tokens, ENTROPY_FORWARD[settings.entropy_chunking])
    found = [
        Phase("rollout", actor_idle, critics_idle, settings.gpu_memory_utilization * settings.machine.memory * GIB),
        Phase("old log-probs", _held(actor, settings, "forward"), critics_idle, working=log_probs),
    ]
    if settings.reference:
        working = forward_working(actor, settings.log_prob_tokens)
        found.append(Phase("reference", actor_idle, critics_idle, working=working))
    if critics:
        found.append(Phase("values", actor_idle, **during("forward", "forward", settings.value_tokens)))
        tokens = getattr(settings, update_budget(algorithm))
        found.append(Phase("critic update", actor_idle, **during("update", "update", tokens)))
    working = update_working(actor, settings.actor_tokens, ENTROPY_UPDATE[settings.entropy_chunking])
    found.append(Phase("actor update", _held(actor, settings, "update"), critics_idle, working=working))
    return found


def host_memory(settings: Settings, algorithm: str) -> float:
    """Bytes of a node's memory that offloaded models take, pinned by torch."""
    critics = settings.critics(algorithm) if settings.critic_offload else []
    total = sum((1 + MOMENTS) * _pinned(critic, settings.critic_fsdp_size, settings) for critic in critics)
    copies = (1 + MOMENTS) * settings.actor_offload + settings.reference
    return (total + copies * _pinned(settings.actor, settings.actor_fsdp_size, settings)) * settings.gpus


def _pinned(model: Model, size: int, settings: Settings) -> int:
    """Pinned bytes of a GPU's float32 copy of a model: torch gives each tensor's shard the next power of two."""
    sizes = [
        (count, MASTER * -(-rows // ranks(size, settings)) * width) for count, rows, width in model.tensors if count
    ]
    return sum(count * (1 << (bytes_ - 1).bit_length()) for count, bytes_ in sizes)


def cache_tokens(settings: Settings) -> int:
    """Tokens that the key-value cache of one vLLM replica holds; 0 or less if the weights alone are too large.

    vLLM does not start with fewer than ``rollout.max_model_len``, which the recipe sets to the longest sequence.
    """
    actor, split = settings.actor, settings.tensor_parallel
    share = settings.gpu_memory_utilization * settings.machine.memory * GIB
    return int((share - COMPUTE * actor.params / split - VLLM_OVERHEAD) * split / actor.kv_bytes)

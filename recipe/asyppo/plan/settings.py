"""What a plan is made for: models, machine, batch, and the settings of verl that memory depends on."""

import dataclasses
from typing import Any

from recipe.asyppo.plan.model import Model

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A GPU, SXM form."""

    memory: float
    """GiB that a process finds on it."""
    flops: float
    """Dense bf16 peak, operations a second."""
    bandwidth: float
    """Of its memory, bytes a second."""


HARDWARE = {
    # NVIDIA's data sheets (dense figures, without sparsity); memory as torch reports it.
    "a100": Hardware(79.1, 312e12, 2.039e12),
    "h100": Hardware(79.1, 989.4e12, 3.35e12),
    "h200": Hardware(139.8, 989.4e12, 4.8e12),
}


def _setting(default: Any, meaning: str, **options: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning, **options})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every field but the models is an option of the command line, with the same name.

    The defaults are those of the recipe on one node, ``recipe/asyppo/run_qwen3.sh``.
    """

    actor: Model
    critic: Model
    """A mini-critic, with its value head; also the one critic of ``ppo_small_critic``."""
    num_critics: int = _setting(2, "M, mini-critics of asyppo (asyppo.num_critics)")
    hardware: str = _setting("h100", "kind of GPU", choices=sorted(HARDWARE))
    gpus: int = _setting(8, "GPUs of a node (trainer.n_gpus_per_node)")
    nodes: int = _setting(1, "nodes (trainer.nnodes)")
    gpu_memory: float = _setting(0.0, "GiB of a GPU; 0: what the hardware has")
    reserve: float = _setting(6.0, "GiB a GPU for CUDA contexts, NCCL, sleeping vLLM, fragmentation; an assumption")

    prompts: int = _setting(32, "prompts a step (data.train_batch_size)")
    responses: int = _setting(32, "responses a prompt (rollout.n)")
    prompt_length: int = _setting(1024, "longest prompt (data.max_prompt_length)")
    response_length: int = _setting(8192, "longest response (data.max_response_length)")
    mean_prompt_length: int = _setting(256, "mean prompt, for the work of a step")
    mean_response_length: int = _setting(4096, "mean response, for the work of a step")
    actor_epochs: int = _setting(4, "passes of the actor over the batch (actor.ppo_epochs)")
    critic_epochs: int = _setting(4, "passes of a critic over its data (critic.ppo_epochs)")
    reference: bool = _setting(False, "a reference model for a KL term (actor.use_kl_loss, algorithm.use_kl_in_reward)")

    actor_tokens: int = _setting(18432, "actor.ppo_max_token_len_per_gpu")
    log_prob_tokens: int = _setting(36864, "rollout.log_prob_max_token_len_per_gpu, and that of ref")
    critic_tokens: int = _setting(36864, "critic.ppo_max_token_len_per_gpu")
    value_tokens: int = _setting(
        36864, "critic.forward_max_token_len_per_gpu; with ALGO=ppo critic.ppo_infer_max_token_len_per_gpu, updates too"
    )
    entropy_chunking: bool = _setting(False, "actor.entropy_from_logits_with_chunking")
    actor_sp: int = _setting(1, "actor.fsdp_config.ulysses_sequence_parallel_size, and that of ref")
    critic_sp: int = _setting(1, "critic.fsdp.ulysses_sequence_parallel_size")
    actor_fsdp_size: int = _setting(-1, "GPUs that share the actor's states (actor.fsdp_config.fsdp_size); -1: all")
    critic_fsdp_size: int = _setting(
        -1,
        "GPUs that share a critic's states (critic.fsdp.fsdp_size); -1: all; the recipe on several nodes: those of one",
    )
    actor_offload: bool = _setting(False, "param_offload and optimizer_offload of the actor")
    critic_offload: bool = _setting(False, "param_offload and optimizer_offload of the critics")
    update_critics_first: bool = _setting(False, "mini-critics that evaluate twice (asyppo.update_critics_first=True)")
    eager_critics: bool = _setting(False, "mini-critics that are not compiled (asyppo.compile_critics=False)")

    tensor_parallel: int = _setting(1, "rollout.tensor_model_parallel_size")
    gpu_memory_utilization: float = _setting(0.6, "share of a GPU that vLLM takes (rollout.gpu_memory_utilization)")
    max_num_seqs: int = _setting(256, "sequences that vLLM runs at once (rollout.max_num_seqs)")
    matrix_use: float = _setting(0.75, "share of the GPU's peak that matrix products reach; fitted on an H200")
    attention_use: float = _setting(0.3, "share of it that attention reaches; fitted on an H200")
    bandwidth_use: float = _setting(0.6, "share of the memory bandwidth that generation reaches; an assumption")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, free = getattr(self, field.name), ("gpu_memory", "reserve", "actor_fsdp_size", "critic_fsdp_size")
            if isinstance(value, int | float) and not isinstance(value, bool) and field.name not in free:
                _require(value > 0, field.name, value, "give a number above 0")
        _require(self.hardware in HARDWARE, "hardware", self.hardware, f"use one of {', '.join(sorted(HARDWARE))}")
        for name in ("gpu_memory", "reserve"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "give GiB, 0 or more")
        for name in ("gpu_memory_utilization", "matrix_use", "attention_use", "bandwidth_use"):
            _require(getattr(self, name) <= 1, name, getattr(self, name), "give a share above 0 and at most 1")
        for name in ("prompt_length", "response_length"):
            mean = getattr(self, f"mean_{name}")
            _require(
                mean <= getattr(self, name), f"mean_{name}", mean, f"at most {_option(name)}={getattr(self, name)}"
            )
        self._check_parallelism()
        _require(
            self.num_critics <= self.responses,
            "num_critics",
            self.num_critics,
            f"every mini-critic needs a response of each prompt: at most {_option('responses')}={self.responses}",
        )

    def _check_parallelism(self) -> None:
        for name in ("actor_sp", "critic_sp", "tensor_parallel"):
            size = getattr(self, name)
            model = self.critic if name == "critic_sp" else self.actor
            _require(self.world % size == 0, name, size, f"choose a divisor of the {self.world} GPUs")
            _require(
                model.heads % size == 0, name, size, f"choose a divisor of the {model.heads} heads of {model.name}"
            )
        for name in ("actor_fsdp_size", "critic_fsdp_size"):
            size = getattr(self, name)
            fits = size == -1 or (size > 0 and self.world % min(size, self.world) == 0)
            _require(fits, name, size, f"choose -1 or a divisor of the {self.world} GPUs")
        for name, ranks in (
            ("actor_tokens", self.actor_sp),
            ("log_prob_tokens", self.actor_sp),
            ("critic_tokens", self.critic_sp),
            ("value_tokens", self.critic_sp),
        ):
            least = -(-self.longest // ranks)
            _require(
                getattr(self, name) >= least,
                name,
                getattr(self, name),
                f"a micro-batch must hold the longest sequence, {self.longest} tokens over {ranks} GPUs: at least {least}",
            )

    @property
    def world(self) -> int:
        return self.nodes * self.gpus

    @property
    def machine(self) -> Hardware:
        """The GPU, with the memory asked for."""
        known = HARDWARE[self.hardware]
        return dataclasses.replace(known, memory=self.gpu_memory or known.memory)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt_length + self.response_length

    @property
    def sequences(self) -> int:
        """Responses of a step."""
        return self.prompts * self.responses

    @property
    def mean_length(self) -> int:
        """Mean tokens of a sequence, prompt included."""
        return self.mean_prompt_length + self.mean_response_length

    def critics(self, algorithm: str) -> list[Model]:
        """The critics that an algorithm of :data:`ALGORITHMS` trains."""
        return {
            "asyppo": [self.critic] * self.num_critics,
            "ppo": [self.actor.as_critic()],
            "ppo_small_critic": [self.critic],
            "grpo": [],
        }[algorithm]

    def built(self, algorithm: str) -> str:
        """How an algorithm's critics are built, a key of :data:`recipe.asyppo.plan.cost.TRAFFIC`."""
        if algorithm != "asyppo" or self.critic_sp > 1:  # sequence parallelism wants flash-attn, which is not compiled
            return "verl"
        if not self.eager_critics:
            return "compiled"
        return "packed" if self.num_critics > 1 else "verl"  # one critic is verl's


ALGORITHMS = ("asyppo", "ppo", "ppo_small_critic", "grpo")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require(holds: bool, name: str, value: Any, fix: str) -> None:
    if not holds:
        raise ValueError(f"{_option(name)}={value} is not possible: {fix}")

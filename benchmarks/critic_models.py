"""The critics of ``critic_cost.py``: built as verl builds them and changed by options; their update and their evaluation.

Shapes: M critics (1 unless they are stacked), B rows, T tokens, I and O widths before and after a linear layer.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from critic_cases import ATTENTION, PROMPT, Case
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AttentionInterface, AutoModelForTokenClassification, Qwen3Config, modeling_utils
from transformers.utils import is_flash_attn_2_available

from asyppo_verl import packed_attention, value_model

KERNELS = {
    "attention": r"flash|fmha|attention|sdpa|softmax",
    "AdamW and clipping": r"adam|multi_tensor|foreach|lpnorm",
    "products": r"gemm|gemv|nvjet|cutlass|cublas|splitk|aten::(mm|bmm|addmm)",
    "compiled": r"^triton_",
    "copies": r"memcpy|memset|copy|cat|fill|split_with_sizes",
    "element by element": r"elementwise|reduce|liger|rms|rope|swiglu|aten::",
}
"""Kinds of kernels by their names, the first that fits."""


def attention(options: Collection[str], device: str) -> str:
    for option in options:
        if option in ATTENTION:
            return ATTENTION[option]
    if "stack" in options:  # transformers' own want one packed row, not one for each critic
        return packed_attention.NAME
    return "flash_attention_2" if device == "cuda" and is_flash_attn_2_available() else "sdpa"


def cudnn_attention(_: Any, *states: Any, scaling: float, cu_seq_lens_q: Tensor, **__: Any) -> tuple[Tensor, None]:
    """Attention as transformers calls it, by cuDNN for each sequence of a packed row."""
    query, key, value, _mask = states
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        return packed_attention.one_by_one(query, key, value, cu_seq_lens_q, scaling), None


def attention_of_each(_: Any, *states: Any, scaling: float, cu_seq_lens_q: Tensor, **__: Any) -> tuple[Tensor, None]:
    """The same with the kernel that torch chooses."""
    query, key, value, _mask = states
    return packed_attention.one_by_one(query, key, value, cu_seq_lens_q, scaling), None


def register_attention() -> None:
    packed_attention.register(modeling_utils)
    AttentionInterface.register("each", attention_of_each)
    AttentionInterface.register("cudnn", cudnn_attention)


def new_model(case: Case, device: str) -> Any:
    """A value model with random weights."""
    config = Qwen3Config(**case.model.shape, num_labels=1, classifier_dropout=0.0, use_cache=False)
    kernel = attention(case.options, device)
    dtype = torch.float32 if case.is_full else torch.bfloat16
    with torch.device(device):
        return AutoModelForTokenClassification.from_config(config, dtype=dtype, attn_implementation=kernel)


def prepared(model: Any, case: Case) -> Any:
    """A value model as verl prepares it, changed by the case's options."""
    options, length = case.options, PROMPT + case.length
    if "liger" in options:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, swiglu=True)
    if "nockpt" not in options:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if "compile" in options:
        value_model.compile_layers(model)
    if "head" in options:
        model.score.register_forward_pre_hook(lambda _, args: (args[0].unflatten(-2, (-1, length))[..., PROMPT:, :],))
    if {"bounds", "varlen", "each", "cudnn", "stack"} & options:
        packed_attention.find_bounds_once(model)
    if case.is_full:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in [*model.model.layers, model]:
            fully_shard(module, mp_policy=policy, reshard_after_forward=not {"keep", "copy"} & options)
    return model


def build(case: Case, device: str) -> list[Any]:
    """The case's critics, ready to train; stacked, they are one model."""
    register_attention()
    models = [new_model(case, device) for _ in range(case.count)]
    if "stack" in case.options:
        models = [stacked(models)]
    return [prepared(model, case) for model in models]


class StackedLinear(nn.Module):
    """Linear layers of M critics: (M, T, I) to (M, T, O) in one batched product."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        bias = [layer.bias.detach()[None] for layer in layers if layer.bias is not None]
        self.bias = nn.Parameter(torch.stack(bias)) if bias else None

    def forward(self, inputs_MTI: Tensor) -> Tensor:
        outputs_MTO = inputs_MTI.flatten(1, -2) @ self.weight.mT
        outputs_MTO = outputs_MTO if self.bias is None else outputs_MTO + self.bias
        return outputs_MTO.unflatten(1, inputs_MTI.shape[1:-1])


class StackedEmbedding(nn.Module):
    """Embeddings of M critics: tokens (M, T) to (M, T, O)."""

    def __init__(self, layers: Sequence[nn.Embedding]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))

    def forward(self, ids_MT: Tensor) -> Tensor:
        return torch.stack(
            [nn.functional.embedding(ids_T, weight) for ids_T, weight in zip(ids_MT, self.weight, strict=True)]
        )


def stacked(models: Sequence[Any]) -> Any:
    """One model that is all of ``models``: critic m is row m of every batch and of every weight."""
    first = models[0]
    for name, module in list(first.named_modules()):
        same = [model.get_submodule(name) for model in models]
        parent = first.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear):
            setattr(parent, name.rpartition(".")[2], StackedLinear(same))
        elif isinstance(module, nn.Embedding):
            setattr(parent, name.rpartition(".")[2], StackedEmbedding(same))
        elif isinstance(weight := getattr(module, "weight", None), nn.Parameter):  # a norm, over heads or not
            shape = (len(models), 1, 1, -1) if name.endswith(("q_norm", "k_norm")) else (len(models), 1, -1)
            module.weight = nn.Parameter(torch.stack([other.weight.detach() for other in same]).view(shape))
            assert weight.dim() == 1
    return first


class Batch:
    """Random rows (B, T), returns to learn, and what each critic has of them."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        generator = torch.Generator(device).manual_seed(0)
        shape = case.rows, PROMPT + case.length
        self.ids_BT = torch.randint(0, case.model.vocab, shape, device=device, generator=generator)
        self.returns_BT = torch.randn(case.rows, case.length, device=device, generator=generator)

    def parts(self, phase: str, index: int) -> list[tuple[Tensor, Tensor]]:
        """Tokens and returns of each micro-batch of critic ``index``; of all stacked critics, with their axis first."""
        stack, count = "stack" in self.case.options, self.case.count
        everything = phase == "evaluation"

        def rows(tensor_BT: Tensor, critic: int) -> Tensor:
            return tensor_BT if everything else tensor_BT[critic::count]

        whole = [
            torch.stack([rows(tensor, critic) for critic in (range(count) if stack else [index])])
            for tensor in (self.ids_BT, self.returns_BT)
        ]
        sizes = self.case.micro_batches(phase, index)
        return list(zip(*(tensor_MBT.split(sizes, 1) for tensor_MBT in whole), strict=True))


def values_of(model: Any, ids_MBT: Tensor) -> Tensor:
    """Values (M, B, T) on response positions, of packed rows."""
    critics, rows, length = ids_MBT.shape
    positions_MT = torch.arange(length, device=ids_MBT.device).repeat(critics, rows)
    with torch.autocast(ids_MBT.device.type, torch.bfloat16):
        logits = model(input_ids=ids_MBT.flatten(1), position_ids=positions_MT, use_cache=False).logits
    values = logits.float().view(critics, rows, -1)
    return values[:, :, PROMPT - length :] if values.shape[-1] == length else values


def evaluate(models: Sequence[Any], batch: Batch) -> Tensor:
    """Every critic evaluates every row; returns the root mean square of all values."""
    values = []
    with torch.no_grad():
        for index, model in enumerate(models):
            model.eval()
            values += [values_of(model, ids_MBT).flatten() for ids_MBT, _ in batch.parts("evaluation", index)]
    return torch.cat(values).square().mean().sqrt()


def update(models: Sequence[Any], adamw: Sequence[torch.optim.AdamW], batch: Batch) -> Tensor | None:
    """One optimizer step of every critic on its share of the rows, towards random returns; returns all gradients' norm."""
    norms: list[Any] = []
    case = batch.case
    for index, model in enumerate(models):
        parts = batch.parts("update", index)
        tokens = sum(returns_MBT[0].numel() for _, returns_MBT in parts)
        model.train()
        for ids_MBT, returns_MBT in parts:
            if "copy" in case.options:
                model.set_reshard_after_backward(returns_MBT is parts[-1][1])
            squares_MBT = (values_of(model, ids_MBT) - returns_MBT).square()
            (0.5 * squares_MBT.sum() / tokens).backward()
        if case.is_full:
            norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # a DTensor
            norms.append(norm.full_tensor())
            adamw[index].step()
        model.zero_grad()
    return torch.stack(norms).norm() if norms else None


def kernels_of(action: Callable[[], object], device: str) -> dict:
    """Seconds of ``action`` by kind of kernel, and the kernels that take most (on a CPU: operators)."""
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        action()
        if device == "cuda":
            torch.cuda.synchronize()
    kinds: dict[str, float] = {}
    taken = []
    for event in profiler.key_averages():
        seconds = (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e6
        kind = next(
            (kind for kind, pattern in KERNELS.items() if re.search(pattern, event.key, re.IGNORECASE)), "other"
        )
        kinds[kind] = kinds.get(kind, 0) + seconds
        taken.append((seconds, event.count, event.key[:150]))
    return {"kinds": kinds, "most": sorted(taken, reverse=True)[:20]}

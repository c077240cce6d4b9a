"""Attention over packed rows with torch's own kernels: neither flash-attn nor a dense mask is needed.

Shapes: B batches, H heads, T tokens of the sequences packed into a batch, D width of a head, S sequences.
"""

from typing import Any

import torch
from torch import Tensor, nn

NAME = "torch_packed"
"""What ``attn_implementation`` says to have it."""

UNSUPPORTED = ("dropout", "sliding_window", "softcap", "s_aux")
"""What transformers may ask of an attention function beyond this one."""


def bounds_of(position_ids_BT: Tensor) -> dict[str, Any]:
    """Where the packed sequences begin and end, under the names that transformers' attention functions know.

    A sequence begins where the position is 0. To find out, the program waits for the device.

    Raises:
        ValueError: if the first position is not 0, as in a rank's slice under sequence parallelism.
    """
    positions = position_ids_BT.flatten()
    end = torch.full((1,), len(positions), device=positions.device)
    bounds = torch.cat([(positions == 0).nonzero().flatten(), end]).int()
    if bounds[0]:  # the first 0 is the first position, or there was none
        raise ValueError(
            f"packed positions begin at {int(positions[0])}, not at 0: a rank has a slice of the sequences. {NAME} knows no "
            "sequence parallelism: set ulysses_sequence_parallel_size=1, or attn_implementation=flash_attention_2"
        )
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def wants_bounds(model: Any) -> bool:
    """Whether a model, wrapped by FSDP or not, looks for the bounds of packed sequences in every layer, and can be given them.

    transformers' own models pass on what their attention may want; of others' code that is not known.
    """
    model = getattr(model, "_fsdp_wrapped_module", model)
    attention = str(model.config._attn_implementation)
    is_known = any(cls.__module__.startswith("transformers.models.") for cls in type(model).__mro__)
    return is_known and (attention == NAME or attention.startswith("flash_attention"))


def find_bounds_once(model: nn.Module) -> None:
    """Let ``model`` look for the bounds of its packed sequences once a call, not once a layer.

    transformers waits for the device several times a layer while it looks.
    """

    def with_bounds(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | bounds_of(kwargs["position_ids"])

    model.register_forward_pre_hook(with_bounds, with_kwargs=True)


def packed_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    position_ids: Tensor,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sequence, as transformers calls it; returns (B, T, H, D).

    On a GPU one call of torch's FlashAttention-2 for rows of any lengths; elsewhere a call for each sequence.

    Raises:
        ValueError: if the model's attention has more to it, such as a window, sinks or dropout.
    """
    if asked := [it for it in UNSUPPORTED if isinstance(more.get(it), Tensor) or more.get(it)]:
        raise ValueError(
            f"attn_implementation={NAME} has no {', '.join(asked)}, which {type(module).__name__} asks for; set "
            "attn_implementation=sdpa or flash_attention_2"
        )
    if cu_seq_lens_q is None:
        bounds = bounds_of(position_ids)
        cu_seq_lens_q, max_length_q = bounds["cu_seq_lens_q"], bounds["max_length_q"]
    if query_BHTD.device.type != "cuda":
        return one_by_one(query_BHTD, key_BHTD, value_BHTD, cu_seq_lens_q, scaling), None
    packed = [states.transpose(1, 2).flatten(0, 1) for states in (query_BHTD, key_BHTD, value_BHTD)]
    sizes = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
    output = torch.ops.aten._flash_attention_forward(*packed, *sizes, 0.0, True, False, scale=scaling)[0]
    return output.unflatten(0, (len(query_BHTD), -1)), None


def one_by_one(query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, bounds_S: Tensor, scaling: float) -> Tensor:
    """The same with torch's ``scaled_dot_product_attention``, sequence by sequence."""
    lengths = bounds_S.diff().tolist()
    packed = [states.transpose(0, 1).flatten(1, 2).split(lengths, 1) for states in (query_BHTD, key_BHTD, value_BHTD)]
    outputs = [
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(*((s[None] for s in part) for part in packed), strict=True)
    ]
    return torch.cat(outputs, 2)[0].transpose(0, 1).unflatten(0, (len(query_BHTD), -1))


def register(modeling_utils: Any) -> None:
    """Make it known to ``transformers.modeling_utils``; transformers builds no mask for a name that is not its own."""
    modeling_utils.AttentionInterface.register(NAME, packed_attention)

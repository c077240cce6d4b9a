"""Value models: the attention implementation that the configuration asks for, and a value head in float32."""

from collections.abc import Callable
from typing import Any

import torch
import wrapt
from torch import Tensor, nn

HEADS = ("score", "classifier", "v_head.summary")
"""Places of the value head in transformers' token classifiers and TRL's value models."""


class Float32Linear(nn.Linear):
    """A linear layer that multiplies in float32, whatever the precision of what it is given."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Multiply in float32, also under autocast: in bf16 values near 0.6 differ in steps of 0.004, and sigma ties."""
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(hidden.float(), self.weight.float(), bias)


def use_float32_head(module: Any) -> None:
    """Let the value head of a model, sharded by FSDP or not, compute in float32; its weights stay where they are.

    Raises:
        ValueError: if the head is not a linear layer in one of the known places.
    """
    module = getattr(module, "_fsdp_wrapped_module", module)
    for name in HEADS:
        parent, _, child = name.rpartition(".")
        head = getattr(getattr(module, parent, None) if parent else module, child, None)
        head = getattr(head, "_fsdp_wrapped_module", head)
        if type(head) is nn.Linear:
            head.__class__ = Float32Linear
            return
    if not any(isinstance(layer, Float32Linear) for layer in module.modules()):
        raise ValueError(
            f"no value head found in {type(module).__name__}: it must be a linear layer named {', '.join(HEADS)}; set "
            "critic.model.path to a model that has a token-classification class"
        )


def compile_layers(module: Any) -> None:
    """Compile the layers of a model, sharded by FSDP or not, as one function for all of them and any number of tokens.

    A layer's forward alone is compiled: FSDP's hooks and the checkpointing around it stay as they are, and so do the names
    of the weights.
    """
    repeated = set(getattr(module, "_fsdp_wrapped_module", module)._no_split_modules)
    for layer in module.modules():
        if repeated & {cls.__name__ for cls in type(layer).__mro__}:
            layer.forward = _for_one_kind_of_input(torch.compile(layer.forward, dynamic=True))


def _for_one_kind_of_input(forward: Callable) -> Callable:
    """Hand tensors to a compiled layer as views, and in an evaluation without gradients.

    Hidden states are views under FSDP, non-views when a checkpoint is recomputed, and embeddings require gradients
    in an evaluation too: each kind would be compiled separately, twice the work.
    """

    def one_kind(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        return argument.view_as(argument) if torch.is_grad_enabled() else argument.detach()

    return lambda *args, **kwargs: forward(*map(one_kind, args), **kwargs)


def install(model_module: Any) -> None:
    """Replace ``load_valuehead_model`` in ``verl.utils.model``, which hard-codes flash_attention_2; idempotent.

    verl then builds token-classification critics with ``override_config.attn_implementation`` of their model node.
    Architectures without a token-classification class keep verl's own path (a TRL value head).
    """
    if not isinstance(model_module.load_valuehead_model, wrapt.FunctionWrapper):
        wrapt.wrap_function_wrapper(model_module, "load_valuehead_model", _load_value_model)


def _load_value_model(wrapped: Any, _instance: Any, _args: Any, kwargs: Any) -> Any:
    from transformers import AutoModelForTokenClassification

    config = kwargs["model_config"]
    if type(config) not in AutoModelForTokenClassification._model_mapping:
        return wrapped(**kwargs)
    return AutoModelForTokenClassification.from_pretrained(
        kwargs["local_path"],
        dtype=kwargs["torch_dtype"],
        config=config,
        attn_implementation=config._attn_implementation,
        trust_remote_code=kwargs["trust_remote_code"],
    )

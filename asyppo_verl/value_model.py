"""Value models with the attention implementation that the configuration asks for."""

from typing import Any

import wrapt


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

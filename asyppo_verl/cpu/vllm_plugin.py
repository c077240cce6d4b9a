"""vLLM on a CPU whose weights can be replaced while it runs."""

from typing import Any

from asyppo_verl.cpu import is_selected


def register() -> None:
    """Make vLLM's CPU linear layers read their weights at every call (``vllm.general_plugins`` entry point).

    vLLM prepacks CPU weights once and drops or ignores the originals, so that the trainer's new weights would fail to
    load or, worse, be ignored in silence. Does nothing unless ``VERL_PLATFORM=cpu``.
    """
    if not is_selected():
        return
    import torch
    from vllm.model_executor.layers import utils

    def keep_weight(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = keep_weight

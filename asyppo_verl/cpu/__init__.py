"""verl and vLLM on a machine without an accelerator, chosen only by ``VERL_PLATFORM=cpu``."""

import os

ENVIRONMENT = {
    # verl registers its FSDP engines for "cuda" only; they run unchanged on a CPU.
    "VERL_ENGINE_DEVICE": "cuda",
    # vLLM finds out that it is the CPU build from the version of a distribution named vllm, which there is not.
    "VLLM_TARGET_DEVICE": "cpu",
    # vLLM compiles a sampler function at the first generation, with a C++ compiler, for 10 to 18 s. torch looks once, early.
    "TORCH_COMPILE_DISABLE": "1",
}
"""Variables that a process needs, unless the user has set them."""


def is_selected() -> bool:
    """True if the environment asks verl for the CPU."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"

"""verl and vLLM on a machine without an accelerator, chosen only by ``VERL_PLATFORM=cpu``."""

import os


def is_selected() -> bool:
    """True if the environment asks verl for the CPU."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def set_environment() -> None:
    """Say in the environment what vLLM and verl have to know on a CPU, unless it is said already."""
    # verl registers its FSDP engines for "cuda" only; they run unchanged on a CPU.
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    # vLLM finds out that it is the CPU build from the version of a distribution named vllm, which there is not.
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    # vLLM compiles a sampler function at the first generation, with a C++ compiler, for 10 to 18 s.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

"""verl and vLLM on a machine without an accelerator, chosen only by ``VERL_PLATFORM=cpu``."""

import os


def is_selected() -> bool:
    """True if the environment asks verl for the CPU."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"

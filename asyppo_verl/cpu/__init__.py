"""verl and vLLM on a machine without an accelerator, chosen only by ``VERL_PLATFORM=cpu``."""

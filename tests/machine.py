"""What of a machine decides the last bits of a sum: recorded with golden numbers, so that a test knows what to expect."""

from pathlib import Path

import torch

BLAS_FLAGS = ("avx", "fma", "amx", "asimd", "sve", "sse4")
"""Beginnings of the names of the processor's features that torch's and MKL's kernels are chosen by."""


def signature() -> dict[str, str]:
    """Two machines with the same signature give the same bits, as far as we know; others may differ in the last ones."""
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    cpu = {key.strip(): value.strip() for key, value in lines}
    flags = sorted(flag for flag in cpu.get("flags", cpu.get("Features", "")).split() if flag.startswith(BLAS_FLAGS))
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "model": cpu.get("model name", cpu.get("CPU part", "unknown")),
        "flags": " ".join(flags),
    }

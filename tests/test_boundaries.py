"""Imports point one way, and the algorithm needs nothing but torch."""

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "asyppo_verl"
MATH, CONFIG = {"asyppo", "metrics"}, {"config", "layout"}
ALL_CHECKS = {f"checks.{path.stem}" for path in (PACKAGE / "checks").glob("*.py")} - {"checks.batches"}
ALLOWED = {
    # module: (third-party packages it may import, our modules it may import)
    "asyppo": ({"torch"}, set()),
    "metrics": ({"torch"}, {"asyppo"}),
    "layout": (set(), set()),
    "config": (set(), set()),
    "checks.combinations": (set(), {"config", "placement", "checks.quantities", "checks.choices"}),
    "checks.choices": ({"verl"}, {"config", "critic_nodes"}),
    "checks.checkpoints": (set(), {"config"}),
    "checks.single_critics": (
        {"hydra", "omegaconf", "verl"},
        {"config", "checks.choices", "critic_nodes", "checks.kinds", "checks.quantities", "placement"},
    ),
    "critic_nodes": ({"omegaconf"}, {"config"}),
    "checks.files": ({"omegaconf", "pyarrow"}, {"config"}),
    "checks.kinds": ({"omegaconf"}, {"checks.quantities"}),
    "placement": (set(), {"config", "checks.quantities"}),
    "checks.spelling": ({"omegaconf", "verl"}, {"config", "checks.choices", "checks.kinds"}),
    "checkpoint": (set(), set()),
    "checks.quantities": (set(), set()),
    "checks.models": ({"omegaconf", "transformers", "huggingface_hub", "httpx", "verl"}, {"weights"}),
    "weights": ({"safetensors"}, set()),
    "checks.batches": ({"torch"}, set()),
    "retention": (set(), set()),
    "resume": (set(), {"checkpoint", "config", "retention"}),
    "batch_io": ({"torch", "tensordict", "transfer_queue", "verl"}, set()),
    "actor_loss": ({"torch", "tensordict", "verl"}, {"asyppo", "batch_io"}),
    "value_model": ({"wrapt", "transformers"}, set()),
    "critics": ({"torch", "tensordict", "omegaconf", "verl"}, {"value_model", "checkpoint"}),
    "preflight": (
        {"omegaconf"},
        ALL_CHECKS | {"config", "critic_nodes", "placement", "checkpoint", "resume"},
    ),
    "critic_calls": (
        {"torch", "omegaconf", "ray", "verl", "transfer_queue"},
        CONFIG | {"batch_io", "critics"},
    ),
    "trainer": (
        {"torch", "omegaconf", "ray", "verl", "transfer_queue"},
        MATH
        | CONFIG
        | {
            "batch_io",
            "checks.batches",
            "actor_loss",
            "critics",
            "critic_calls",
            "critic_nodes",
            "preflight",
            "retention",
        },
    ),
    "hooks": ({"wrapt"}, {"config", "preflight", "checks.files", "trainer", "value_model", "cpu"}),
    "plugin": (set(), {"hooks"}),
    "plan": ({"transformers"}, {"plan"}),
    "export": ({"torch", "transformers", "verl"}, {"checkpoint", "retention"}),
    "doctor": ({"ray", "verl"}, {"config"}),
    "__init__": (set(), set()),
    "checks.__init__": (set(), set()),
    "cpu": ({"torch", "psutil", "ray", "wrapt", "verl", "vllm"}, {"cpu"}),
}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within_package(parts: Sequence[str]) -> str:
    """A module as the table above calls it: the checks one by one, other folders as a whole."""
    return ".".join(parts[:2]) if parts[0] == "checks" else parts[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path):
    third_party, ours = ALLOWED[within_package(path.relative_to(PACKAGE).with_suffix("").parts)]
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "asyppo_verl":
            assert within_package(rest) in ours, f"{path.name} imports {name}"
        elif top not in sys.stdlib_module_names:
            assert top in third_party, f"{path.name} imports {name}"


def test_the_trainer_does_no_arithmetic_on_tensors():
    """Formulas live in asyppo.py and metrics.py; the trainer may only count rows."""
    for node in ast.walk(ast.parse((PACKAGE / "trainer.py").read_text())):
        if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.BitOr):
            assert not any(isinstance(n, ast.Name) and n.id[-2:] in ("_N", "BT") for n in ast.walk(node)), ast.unparse(
                node
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in ("where", "mean", "std", "var", "topk", "kthvalue", "quantile"), ast.unparse(
                node
            )

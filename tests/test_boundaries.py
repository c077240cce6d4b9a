"""Imports point one way, and the algorithm needs nothing but torch."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "asyppo_verl"
MATH, CONFIG = {"asyppo", "metrics"}, {"config", "layout"}
CONFIG_CHECKS = {"checks", "checkpoint_checks", "critic_checks", "file_checks", "kind_checks", "spelling"}
ALLOWED = {
    # module: (third-party packages it may import, our modules it may import)
    "asyppo": ({"torch"}, set()),
    "metrics": ({"torch"}, {"asyppo"}),
    "layout": (set(), set()),
    "config": (set(), set()),
    "checks": (set(), {"config", "placement", "number_checks", "choice_checks"}),
    "choice_checks": ({"verl"}, {"config", "critic_nodes"}),
    "checkpoint_checks": (set(), {"config"}),
    "critic_checks": (
        {"hydra", "omegaconf", "verl"},
        {"config", "choice_checks", "critic_nodes", "kind_checks", "number_checks", "placement"},
    ),
    "critic_nodes": ({"omegaconf"}, {"config"}),
    "file_checks": ({"omegaconf", "pyarrow"}, {"config"}),
    "kind_checks": ({"omegaconf"}, {"number_checks"}),
    "placement": (set(), {"config", "number_checks"}),
    "spelling": ({"omegaconf", "verl"}, {"config", "choice_checks", "kind_checks"}),
    "checkpoint": (set(), set()),
    "number_checks": (set(), set()),
    "model_checks": ({"omegaconf", "transformers", "huggingface_hub", "httpx", "verl"}, {"weights"}),
    "weights": ({"safetensors"}, set()),
    "batch_checks": ({"torch"}, set()),
    "retention": (set(), set()),
    "resume": (set(), {"checkpoint", "config", "retention"}),
    "batch_io": ({"torch", "tensordict", "transfer_queue", "verl"}, set()),
    "actor_loss": ({"torch", "tensordict", "verl"}, {"asyppo", "batch_io"}),
    "value_model": ({"wrapt", "transformers"}, set()),
    "critics": ({"torch", "tensordict", "omegaconf", "verl"}, {"value_model", "checkpoint"}),
    "preflight": (
        {"omegaconf"},
        CONFIG_CHECKS | {"config", "model_checks", "critic_nodes", "placement", "checkpoint", "resume"},
    ),
    "critic_calls": (
        {"torch", "omegaconf", "ray", "verl", "transfer_queue"},
        CONFIG | {"batch_io", "critics"},
    ),
    "trainer": (
        {"torch", "omegaconf", "ray", "verl", "transfer_queue"},
        MATH | CONFIG | {"batch_io", "batch_checks", "actor_loss", "critics", "critic_calls", "preflight", "retention"},
    ),
    "hooks": ({"wrapt"}, {"config", "preflight", "file_checks", "trainer", "value_model", "cpu"}),
    "plugin": (set(), {"hooks"}),
    "plan": ({"transformers"}, {"plan"}),
    "export": ({"torch", "transformers", "verl"}, {"checkpoint", "retention"}),
    "doctor": ({"ray", "verl"}, {"config"}),
    "__init__": (set(), set()),
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


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path):
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    third_party, ours = ALLOWED[module]
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "asyppo_verl":
            assert rest[0] in ours, f"{path.name} imports {name}"
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

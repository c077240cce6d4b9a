"""Imports point one way, and the algorithm needs nothing but torch."""

import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "asyppo_verl"
MATH, CONFIG = {"asyppo", "metrics", "selection"}, {"config", "mini_batches"}
ALLOWED = {
    # module or folder: (third-party packages it may import, our modules it may import)
    "__init__": (set(), set()),
    "asyppo": ({"torch"}, {"order_statistics"}),
    "order_statistics": ({"torch"}, set()),
    "adaptive_lam": (set(), set()),
    "metrics": ({"torch"}, {"order_statistics"}),
    "selection": ({"torch"}, {"asyppo", "metrics"}),
    "mini_batches": (set(), set()),
    "config": (set(), set()),
    "critic_settings": ({"omegaconf"}, {"config"}),
    "checkpoint": ({"safetensors"}, set()),
    "retention": ({"ray"}, {"checkpoint"}),
    "preflight": (
        {"hydra", "omegaconf", "ray", "verl", "pyarrow"},
        {"preflight", "config", "critic_settings", "checkpoint", "selection"},
    ),
    "batch_checks": ({"torch"}, set()),
    "batch_io": ({"torch", "tensordict", "transfer_queue", "verl"}, set()),
    "inspection": ({"torch", "numpy", "pyarrow", "transfer_queue"}, {"asyppo", "batch_io"}),
    "actor_loss": ({"torch", "tensordict", "verl"}, {"asyppo", "batch_io"}),
    "value_model": ({"torch", "wrapt", "transformers"}, set()),
    "packed_attention": ({"torch"}, set()),
    "critic_worker": ({"torch", "tensordict", "omegaconf", "verl"}, {"packed_attention", "value_model", "checkpoint"}),
    "critic_client": (
        {"torch", "omegaconf", "ray", "verl", "transfer_queue"},
        CONFIG | {"batch_checks", "batch_io", "critic_settings", "critic_worker"},
    ),
    "trainer": (
        {"torch", "omegaconf", "ray", "verl", "transfer_queue"},
        MATH
        | CONFIG
        | {
            "actor_loss",
            "adaptive_lam",
            "batch_checks",
            "batch_io",
            "critic_client",
            "critic_settings",
            "critic_worker",
            "inspection",
            "retention",
        },
    ),
    "weight_sockets": ({"wrapt", "ray"}, set()),
    "hooks": (
        {"wrapt"},
        {"config", "packed_attention", "preflight", "trainer", "value_model", "cpu", "weight_sockets"},
    ),
    "plugin": (set(), {"hooks"}),
    "export": ({"torch", "transformers", "verl"}, {"checkpoint"}),
    "doctor": ({"ray", "verl"}, {"config"}),
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
    third_party, ours = ALLOWED[path.relative_to(PACKAGE).with_suffix("").parts[0]]
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "asyppo_verl":
            assert rest[0] in ours, f"{path.name} imports {name}"
        elif top not in sys.stdlib_module_names:
            assert top in third_party, f"{path.name} imports {name}"


def test_the_trainer_does_no_arithmetic_on_tensors():
    """Formulas live in asyppo.py and metrics.py; the trainer may only count rows."""
    arithmetic = (ast.BinOp, ast.AugAssign, ast.UnaryOp, ast.Compare)
    formula = re.compile("(where|sum|mean|std|var|clamp|topk|kthvalue|quantile|add|sub|mul|div)_*")
    for node in ast.walk(ast.parse((PACKAGE / "trainer.py").read_text())):
        if isinstance(node, arithmetic) and not isinstance(getattr(node, "op", None), ast.BitOr | ast.Not):
            names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
            assert not any(re.search(r"_[MBTNR]+$", name) for name in names), ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert not formula.fullmatch(node.func.attr), ast.unparse(node)

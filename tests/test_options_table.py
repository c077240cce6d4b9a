"""docs/options.md is kept: every loss mode and trainer of verl has a row, and every test that a row names exists."""

import ast
import re

import pytest
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

from asyppo_verl.config import TRAINER_MODES

STATES = {"works", "refused", "warned", "unproven"}


@pytest.fixture(scope="module")
def rows(root) -> dict[str, tuple[str, str]]:
    """Option -> (state, how we know)."""
    found = {}
    for line in (root / "docs/options.md").read_text().split("## verl's")[1].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `"):
            assert len(cells) == 3, line
            assert cells[0] not in found, f"{cells[0]} has two rows"
            found[cells[0]] = cells[1], cells[2]
    return found


def test_every_row_says_what_and_how(rows):
    for option, (state, how) in rows.items():
        assert state in STATES, f"{option}: {state}"
        assert ("::" in how) == (state != "unproven"), (
            f"{option} is {state}, but {how!r} names no test (or one too many)"
        )


def test_every_named_test_exists(rows, root):
    for option, (_, how) in rows.items():
        for file, name in re.findall(r"`(test_\w+)::(\w+)`", how):
            tree = ast.parse((root / f"tests/{file}.py").read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{option}: {name}"


def test_every_loss_mode_and_trainer_of_verl_has_a_row(rows):
    modes = {match[1] for option in rows if (match := re.fullmatch(r"`policy_loss\.loss_mode=(\w+)`", option))}
    assert modes == set(POLICY_LOSS_REGISTRY)
    trainers = {match[1] for option in rows if (match := re.match(r"`trainer\.v1\.trainer_mode=(\w+)`", option))}
    assert trainers == set(TRAINER_MODES)


def test_a_refused_option_is_in_the_tests_of_refusals(rows):
    assert all("refused" in how for state, how in rows.values() if state == "refused")

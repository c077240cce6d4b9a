"""The README is an interface: its tree, knobs and commands are those of the repository."""

import dataclasses
import re
import subprocess

import pytest

from asyppo_verl.config import AsyPPOConfig


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text()


def test_the_tree_lists_every_file_once(root, readme):
    block = readme.split("## The tree")[1].split("```")[1]
    listed, folder = set(), ""
    for line in block.strip().splitlines():
        name, sentence = re.split(r"\s{2,}|$", line.strip(), maxsplit=1)
        assert sentence or not line.startswith(" "), f"{name} has no sentence"
        if not line.startswith(" "):
            folder = name
        listed.add(name if not line.startswith(" ") else folder + name)
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for file in files:
        if file.split("/")[0] in ("asyppo_verl", "recipe", "scripts", "benchmarks") and not file.endswith(
            "__init__.py"
        ):
            assert any(file == entry or (entry.endswith("/") and file.startswith(entry)) for entry in listed), file
    for entry in listed:
        assert (root / entry).exists(), entry


def test_every_knob_is_in_the_table_with_its_default(readme):
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", readme, re.MULTILINE)
    assert dict(rows) == {
        field.name: str({} if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(AsyPPOConfig)
    }


def test_the_scripts_are_valid_and_the_linked_files_exist(root, readme):
    for script in (root / "scripts").glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert f"scripts/{script.name}" in readme or script.name in readme
    for link in re.findall(r"\]\(([^)]+)\)", readme):
        if not link.startswith("https://"):
            path, _, heading = link.partition("#")
            assert (root / path).exists(), link
            slugs = [
                re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in headings(root / path)
            ]
            assert not heading or heading in slugs, link


def headings(path):
    return [line for line in path.read_text().splitlines() if line.startswith("#")] if path.suffix == ".md" else []


def test_nothing_is_left_to_fill_in(readme):
    assert "PLACEHOLDER" not in readme

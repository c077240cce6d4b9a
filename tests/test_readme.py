"""README and docs are interfaces: the tree, options, commands, links and names in them are those of the repository."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from asyppo_verl.config import AsyPPOConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "recipe/asyppo/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FOLDERS = ("asyppo_verl", "recipe", "scripts", "benchmarks", "docs")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text()


def files(root) -> list[str]:
    """Everything in git, and what would be added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    return [file for file in listed if (root / file).exists()]


def test_the_readme_is_a_door(readme):
    assert len(readme.splitlines()) <= 145 and len(readme.split()) <= 1300


def test_the_tree_has_every_file_once_with_a_sentence(root):
    block = (root / "docs/code.md").read_text().split("## The tree")[1].split("```")[1]
    listed, folder = [], ""
    for line in block.strip().splitlines():
        name, _, sentence = line.strip().partition(" ")
        assert sentence.strip() or name.endswith("/"), f"{name} has no sentence"
        if not line.startswith(" "):
            folder = name
        if sentence:
            listed.append(name if not line.startswith(" ") else folder + name)
    assert len(set(listed)) == len(listed)
    covered = {entry: [] for entry in listed}
    for file in files(root):
        if file.split("/")[0] in FOLDERS and not file.endswith("__init__.py"):
            entries = [entry for entry in listed if file == entry or (entry.endswith("/") and file.startswith(entry))]
            assert len(entries) == 1, f"{file} is in the tree {len(entries)} times"
            covered[entries[0]].append(file)
    assert [entry for entry, found in covered.items() if not found and entry != "tests/"] == []


def test_every_option_is_in_both_tables_and_has_its_default(root, readme):
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", readme, re.MULTILINE)
    assert dict(rows) == {
        field.name: str({} if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(AsyPPOConfig)
    }
    exact = (root / "docs/options.md").read_text().split("## verl's")[0]
    named = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]+) \|", exact, re.MULTILINE)))
    assert named == [name for name, _ in rows]


@each_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith("https://"):
            path, _, heading = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            slugs = [re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in headings(target)]
            assert not heading or heading in slugs, link


def headings(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith("#")] if path.suffix == ".md" else []


@each_page
def test_commands_and_paths_are_those_of_the_repository(root, page):
    text = page.read_text()
    for module in re.findall(r"python -m ((?:asyppo_verl|recipe)[\w.]*)", text):
        path = root / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for path in re.findall(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)}|tests)/[\w/.-]*\w/?)", text):
        assert (root / path).exists(), path
    for file, name in re.findall(r"`(test_\w+)::(\w+)`", text):
        assert f"def {name}(" in (root / f"tests/{file}.py").read_text(), f"{file}::{name}"
    # Modules by their bare names, as in "the hooks in `trainer.py`".
    names = {Path(file).name for file in files(root)}
    for name in re.findall(r"`([\w-]+\.(?:py|sh|yaml))`", text):
        assert name in names, name
    assert "PLACEHOLDER" not in text


def test_every_script_is_valid_and_in_the_readme_or_the_tree(root):
    pages = "".join(page.read_text() for page in PAGES)
    for script in (root / "scripts").glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert script.name in pages


def test_the_picture_is_drawn_by_its_script(root, tmp_path):
    subprocess.run([sys.executable, str(root / "docs/method.py"), str(tmp_path / "method.png")], check=True)
    drawn, kept = (imread(folder / "method.png") for folder in (tmp_path, root / "docs"))
    # Arithmetic differs from processor to processor by less than a line is wide.
    assert drawn.shape == kept.shape and abs(drawn - kept).mean() < 1e-3


def test_the_rule_of_the_page_is_a_selection(root):
    """The code of docs/code.md, run as it stands there."""
    import torch

    code = re.search(r"```python\n(.*?)```", (root / "docs/code.md").read_text(), re.DOTALL)[1]
    space: dict = {}
    exec(code, space)
    advantages_N, is_response_N = torch.tensor([3.0, -1.0, 0.5, -4.0, 9.0]), torch.tensor([1, 1, 1, 1, 0]).bool()
    keep_adv_N, keep_ent_N = space["small_advantages"](advantages_N, is_response_N, 0.5)
    assert keep_adv_N.tolist() == [True, False, False, True, True] and keep_ent_N.all()

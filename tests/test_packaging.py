"""What users install: the wheel, the pins of its extras, the recipe's pin, the image."""

import importlib.metadata
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from asyppo_verl.config import SUPPORTED_VERL


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory):
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    )
    for name in filter(lambda name: (root / name).is_file(), files.stdout.splitlines()):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(folder / "source")], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_file_of_both_packages(root, wheel):
    packed = set(wheel.namelist())
    for folder in ("asyppo_verl", "recipe"):
        for path in (root / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(root)) in packed
    assert not [name for name in packed if name.startswith(("tests/", "scripts/", "benchmarks/"))]
    entry_points = wheel.read(next(name for name in packed if name.endswith("entry_points.txt"))).decode()
    assert "asyppo = asyppo_verl.plugin" in entry_points


PINNED = {"torch": "==2.11.0", "vllm": "==0.24.0", "transformers": "==5.9.0", "flash-attn": "==2.8.3"}


def test_the_gpu_extra_installs_what_verl_pins(root, wheel):
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    (line,) = re.findall(r"Requires-Dist: (verl\[.*?\]==[\d.]+); extra == \"gpu\"", metadata)
    ours = Requirement(line)
    assert str(ours.specifier) == f"=={SUPPORTED_VERL[-1]}"

    pins, extras = defaultdict(SpecifierSet), set(ours.extras)
    requirements = [Requirement(text) for text in importlib.metadata.requires("verl")]
    for _ in range(3):  # verl's extras name further extras of verl
        for requirement in requirements:
            if requirement.marker and any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                extras |= requirement.extras if requirement.name == "verl" else set()
                pins[requirement.name] &= requirement.specifier
    assert [str(pins[name]) for name in PINNED] == list(PINNED.values())
    assert "math-verify" in pins and "TransferQueue" in pins
    (named,) = re.findall(r"# verl's own pins for GPUs \((.*?)\)", (root / "setup.cfg").read_text())
    assert named == ", ".join(f"{name} {pin.removeprefix('==')}" for name, pin in PINNED.items())


def test_the_recipe_and_the_image_pin_the_newest_supported_verl(root):
    newest = SUPPORTED_VERL[-1]
    required = dict(
        line.split("=", 1)
        for line in (root / "recipe/asyppo/REQUIRED_VERL.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    assert required["PIP_INSTALL"] == f"pip install verl=={newest}" and required["TAG"] == f"v{newest}"
    assert f"ARG VERL={newest}\n" in (root / "Dockerfile").read_text()


@pytest.mark.e2e
def test_the_image_copies_what_exists_and_its_check_runs(root):
    """As far as can be seen without a container engine: sources, ignored folders, and the check that ends the build."""
    ignored = (root / ".dockerignore").read_text().split()
    text = (root / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {word for word, _ in steps} == {"ARG", "FROM", "RUN", "WORKDIR", "COPY"}
    for word, rest in steps:
        if word == "COPY":
            for source in rest.split()[:-1]:
                assert (root / source).exists() and source not in ignored, source
    check = shlex.split(steps[-1][1])
    assert check[:2] == ["python3", "-c"]
    subprocess.run([sys.executable, *check[1:]], cwd=root, check=True)

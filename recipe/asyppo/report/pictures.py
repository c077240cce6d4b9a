"""Pictures of a run for documents: ``python -m recipe.asyppo.report.pictures RUN [--out docs]``.

Writes ``asyppo_cpu.png`` (curves) and ``token_view.png``, a screenshot of the page in a headless Chromium.
"""

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipe.asyppo.report import curves
from recipe.asyppo.report.__main__ import write
from recipe.asyppo.report.runs import load

PANELS = [
    "Reward",
    "Explained variance",
    "Sigma: mean and quantiles",
    "|advantage|, kept and masked",
    "Entropy of the actor",
]
PANELS += ["Time by phase, s"]


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser, of playwright.

    Raises:
        SystemExit: if no Chromium is installed.
    """
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if not program:
        raise SystemExit("error: no chromium or google-chrome on the PATH; apt-get install chromium")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=quiet)
        yield browser
        browser.close()


def take(run: Path, out: Path) -> None:
    """Write both pictures."""
    plots = [plot for section in curves.sections([[load(run)]]).values() for plot in section]
    curves.draw([plot for plot in plots if plot.title in PANELS], [run.name], out / "asyppo_cpu.png", columns=3)
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        write([run], Path(folder))
        page = browser.new_page(viewport={"width": 1300, "height": 900}, device_scale_factor=1.5)
        page.goto(f"file://{folder}/index.html")
        page.locator(".response .text span").nth(1).hover()
        box = page.evaluate(
            "(({x, y, width}) => ({x, y: y + scrollY, width, height: 1000}))(tokens.getBoundingClientRect())"
        )
        page.screenshot(path=out / "token_view.png", full_page=True, clip=box)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    take(options.run, options.out)
    print(f"wrote {options.out}/asyppo_cpu.png and {options.out}/token_view.png")


if __name__ == "__main__":
    main()

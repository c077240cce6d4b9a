"""Turn run folders into one page with plots: ``python -m recipe.asyppo.report RUN [RUN ...] [--out FOLDER] [--watch]``.

Writes ``index.html``, which needs no network, and the plots of every section as PNG beside it, into ``report/`` of the first run
folder. Runs that differ in nothing but seeds become one line with a band from their lowest to their highest.
"""

import argparse
import contextlib
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from recipe.asyppo.report import curves, page, tokens
from recipe.asyppo.report.runs import Run, bands, differences, load
from recipe.asyppo.report.verdict import verdict


def band_name(band: Sequence[Run]) -> str:
    """Name of the first run of a band, and how many more runs there are."""
    return band[0].name + (f" and {len(band) - 1} more" if len(band) > 1 else "")


def write(folders: Sequence[Path], out: Path, *, live: bool = False) -> None:
    """Write the page and the plots; a ``live`` page loads itself anew twice a minute.

    Raises:
        ValueError: if a run has no metrics.
    """
    runs = [load(folder) for folder in folders]
    of_bands = bands(runs)
    sections = curves.sections(of_bands)
    names = [band_name(band) for band in of_bands]
    data = {
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "live": live,
        "runs": [{"name": run.name, "steps": len(run.steps)} for run in runs],
        "bands": names,
        "verdict": verdict(runs),
        "settings": [[key, *values] for key, values in differences(runs)],
        "sections": {title: [plot.as_json() for plot in plots] for title, plots in sections.items()},
        "tokens": tokens.view(runs),
    }
    out.mkdir(parents=True, exist_ok=True)
    for title, plots in sections.items():
        curves.draw(plots, names, out / f"{title.lower()}.png", columns=2)
    # In one move: a browser that reloads meanwhile finds the old page or the new one.
    unfinished = out / "index.html.unfinished"
    unfinished.write_text(page.render(data), encoding="utf-8")
    unfinished.replace(out / "index.html")


def watch(folders: Sequence[Path], out: Path, *, seconds: float = 1) -> None:
    """Write a page that loads itself anew whenever a run has gone on, until interrupted; runs without a step are waited for."""
    files = [folder / "metrics.jsonl" if folder.is_dir() else folder for folder in folders]
    seen = None
    while True:
        now = [file.stat().st_size if file.exists() else 0 for file in files]
        if now != seen:
            try:
                write(folders, out, live=True)
                print(f"{datetime.now():%H:%M:%S} wrote {out / 'index.html'}", flush=True)
            except ValueError as error:
                print(f"waiting: {error}", flush=True)
            seen = now
        time.sleep(seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m recipe.asyppo.report")
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run folder, or a .jsonl of verl's file logger"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: report/ in the first run folder")
    parser.add_argument("--watch", action="store_true", help="write anew whenever a run has gone on, until interrupted")
    options = parser.parse_args(arguments)
    first = options.runs[0]
    out = options.out or (first if first.is_dir() else first.parent) / "report"
    try:
        with contextlib.suppress(KeyboardInterrupt):
            if options.watch:
                watch(options.runs, out)
        write(options.runs, out)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {out / 'index.html'} and a PNG for each of its sections")


if __name__ == "__main__":
    main()

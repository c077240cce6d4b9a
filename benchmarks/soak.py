"""Does a long run leak? ``python benchmarks/soak.py --steps 300 --plot soak.png``.

Trains with the CPU script and looks at every process of the run while it does: memory that is the process's own (USS), open
files and sockets, and the pages of /dev/shm. Growth is a straight line through the second half of the run, in MiB per 100
steps. At the end nothing of the run may be left: no process, no shared memory, no socket, nothing in its temporary folder.

Exit code 1 if something grows faster than ``--limit`` or is left. The last line is one JSON object.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
SHM = Path("/dev/shm")
SETTINGS = [
    "data.train_batch_size=16",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
]
SHARED_MEMORY = "shared memory"
DESCRIPTORS = "open files"


def role(command: list[str]) -> str:
    """What a process is to the run: Ray's actors by their class, everything else by its program."""
    title = command[0] if command else ""
    if title.startswith("ray::"):
        return re.split(r"[.:( ]", title.removeprefix("ray::"))[0]
    module = command[command.index("-m") + 1] if "-m" in command else ""
    return module or Path(title.split(" ")[0]).name


def session(leader: int) -> list[psutil.Process]:
    """All processes of a session, those that Ray detached from their parents too."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def look(leader: int, before: set[str]) -> dict[str, float]:
    """MiB of each role and of shared memory, and the number of open files of all processes."""
    sizes: dict[str, float] = defaultdict(float)
    for process in session(leader):
        try:
            name = role(process.cmdline())
            sizes[name] += process.memory_full_info().uss / MIB
            sizes[DESCRIPTORS] += process.num_fds()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    for name in shared_memory() - before:
        try:
            sizes[SHARED_MEMORY] += (SHM / name).stat().st_blocks * 512 / MIB
        except FileNotFoundError:
            continue
    return dict(sizes)


def shared_memory() -> set[str]:
    return {str(path.relative_to(SHM)) for path in SHM.rglob("*") if path.is_file()}


def sockets() -> set[str]:
    """Unix sockets that have a path: those in use, and the files of others in the temporary folder."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    in_use = {line[7] for line in lines if len(line) > 7 and not line[7].startswith("@")}
    return in_use | {str(path) for path in Path(tempfile.gettempdir()).iterdir() if path.is_socket()}


def completed(metrics: Path) -> int:
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def growth(steps: list[int], values: list[float]) -> float:
    """Slope of a line through the second half of a run, a 100 steps."""
    half = [(s, v) for s, v in zip(steps, values, strict=True) if s >= steps[-1] / 2]
    if len({s for s, _ in half}) < 3:
        return float("nan")
    x, y = np.array(half).T
    return float(np.polyfit(x, y, 1)[0] * 100)


def plot(steps: list[int], series: dict[str, list[float]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (memory, files) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained", width_ratios=[2, 1])
    memory.set_prop_cycle(color=plt.get_cmap("tab20")(range(20)))
    for name, values in sorted(series.items(), key=lambda item: -item[1][-1]):
        if name != DESCRIPTORS and max(values) >= 20:
            memory.plot(steps, values, label=name, linewidth=1.2)
    memory.set_ylabel("memory of its own, MiB")
    memory.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    memory.set_yscale("log")
    files.plot(steps, series[DESCRIPTORS], color="black", linewidth=1.2)
    files.set_ylabel("open files and sockets, all processes")
    files.set_ylim(0, 1.1 * max(series[DESCRIPTORS]))
    for axis in (memory, files):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument("--limit", type=float, default=10.0, help="allowed growth of a role, MiB (files) per 100 steps")
    parser.add_argument("--toy", type=Path, help="a ready toy task (recipe.asyppo.toy.make_toy.make)")
    parser.add_argument("--plot", type=Path, help="write a picture of memory and open files by step")
    parser.add_argument("--samples", type=Path, help="write what was seen as JSON")
    parser.add_argument("overrides", nargs="*", help="verl overrides")
    arguments = parser.parse_args()

    shm_before, sockets_before = shared_memory(), sockets()
    folder, own_tmp = (Path(tempfile.mkdtemp(prefix=prefix)) for prefix in ("asyppo-soak-", "soak"))
    metrics = folder / "run/metrics.jsonl"
    environment = {**os.environ, "RUN_DIR": str(folder / "run"), "TMPDIR": str(own_tmp)}
    if arguments.toy:
        environment["TOY_DIR"] = str(arguments.toy)
    command = [
        "bash",
        str(ROOT / "scripts/run_asyppo_cpu.sh"),
        *SETTINGS,
        f"trainer.total_training_steps={arguments.steps}",
        f"trainer.save_freq={max(1, arguments.steps // 6)}",
        *arguments.overrides,
    ]
    steps: list[int] = []
    looks: list[dict[str, float]] = []
    with open(folder / "shown", "w") as shown:
        process = subprocess.Popen(
            command, env=environment, stdout=shown, stderr=subprocess.STDOUT, start_new_session=True
        )
    while process.poll() is None:
        step = completed(metrics)
        if 0 < step < arguments.steps:  # after the last step the run's processes leave
            looks.append(look(process.pid, shm_before))
            steps.append(step)
        time.sleep(arguments.every)
    if process.returncode:
        sys.exit(f"the run ended with {process.returncode}:\n{(folder / 'shown').read_text()[-4000:]}")

    if not steps:
        sys.exit(
            f"no look fell between the first and the last of {arguments.steps} steps; raise --steps, or lower --every"
        )
    names = sorted({name for seen in looks for name in seen})
    series = {name: [seen.get(name, 0.0) for seen in looks] for name in names}
    deadline = time.monotonic() + 30
    while session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.5)
    left = {
        "processes": [" ".join(p.cmdline())[:100] for p in session(process.pid)],
        "shared_memory": sorted(shared_memory() - shm_before),
        "sockets": sorted(sockets() - sockets_before),
        "temporary_files": sorted(str(path.relative_to(own_tmp)) for path in own_tmp.rglob("*")),
    }
    slopes = {name: growth(steps, values) for name, values in series.items()}
    print(f"{'':<32} {'first':>9} {'last':>9} {'per 100 steps':>14}")
    for name in sorted(names, key=lambda name: -series[name][-1]):
        print(f"{name:<32} {series[name][0]:>9.1f} {series[name][-1]:>9.1f} {slopes[name]:>+14.2f}")
    if arguments.plot:
        plot(steps, series, arguments.plot)
    if arguments.samples:
        arguments.samples.write_text(json.dumps({"steps": steps, "series": series}))
    grown = {name: round(slope, 2) for name, slope in slopes.items() if slope > arguments.limit}
    print(
        json.dumps(
            {
                "steps": completed(metrics),
                "looks": len(steps),
                "growth_per_100_steps": {n: None if math.isnan(x) else round(x, 2) for n, x in slopes.items()},
                "grown": grown,
                "left": left,
            }
        )
    )
    for path in (folder, own_tmp):
        shutil.rmtree(path)
    sys.exit(1 if grown or any(left.values()) else 0)


if __name__ == "__main__":
    main()

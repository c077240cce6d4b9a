"""Start the many Python processes of a run in less time; active only where this folder is on PYTHONPATH.

Garbage is collected less often, which makes importing torch, vLLM and verl a quarter faster. Ray's workers and vLLM's engine
are forked from a process that has imported them already (:mod:`asyppo_verl.cpu.fork_server`), if there is one.
"""

import gc
import os
import sys

gc.set_threshold(100_000, 50, 100)


def _hand_over() -> None:
    """Let the fork server do what this process was started for, and end as its child ends."""
    import array
    import re
    import signal
    import socket

    words = sys.orig_argv[1:]
    # A process that multiprocessing spawns is told the numbers of two files that it inherits.
    inherited = [int(number) for word in words for number in re.findall(r"(?:tracker_fd|pipe_handle)=(\d+)", word)]
    files = [0, 1, 2, *inherited]
    request = repr((words, files, dict(os.environ), os.getcwd(), os.getpgrp())).encode()
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(os.environ["ASYPPO_FORK_SERVER"])
        except OSError:
            return  # it has ended, as the run is about to
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
        server.sendmsg([len(request).to_bytes(4, "big")], rights)
        server.sendall(request)
        child = int.from_bytes(server.recv(4), "big")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _frame: os.kill(child, number))
        code = server.recv(1)
    os._exit(code[0] if code else 1)


def _start_server() -> None:
    """Let a fork server import what this run's processes need, while this one starts."""
    import subprocess

    os.environ["ASYPPO_FORK_SERVER"] = path = os.path.join(os.environ["TMPDIR"], "fork_server")
    subprocess.Popen([sys.executable, "-m", "asyppo_verl.cpu.fork_server", path])


_program = next((word for word in sys.orig_argv[1:] if not word.startswith("-")), "")
if "ASYPPO_FORK_SERVER" in os.environ:
    if _program.endswith("/default_worker.py") or "spawn_main(" in _program:
        _hand_over()
elif "TMPDIR" in os.environ and _program in ("verl.trainer.main_ppo", "recipe.asyppo.main_asyppo"):
    _start_server()

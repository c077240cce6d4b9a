"""Start the processes of a run in a tenth of a second: fork them from one that has imported torch and vLLM already.

A run on a CPU is a dozen Python processes, of which most import the same modules, for 6 to 14 s each. The server imports them
once. ``FOLDER/python`` then stands for ``python``: given a script or ``-c CODE``, it has the server fork, and lives as long
as the fork; if there is no server, it becomes the real one. Ray starts its workers with it
(``ray_kwargs.ray_init.runtime_env.py_executable``), and they start vLLM's engine with it.

What a library reads from the environment when it is imported is what the server was started with, not what Ray gives to a
worker. On GPUs the server must not touch CUDA, which no fork would survive: it asks NVML alone, and ends if CUDA was started.
"""

import contextlib
import ctypes
import fcntl
import importlib
import json
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import wrapt

from asyppo_verl import cpu

# The heavy ones among what verl imports; not verl itself, which reads its plugins from the environment, nor anything that
# imports Ray, whose library reads its own.
MODULES = [
    "torch._dynamo",
    "transformers.models.qwen3.modeling_qwen3",
    "tensordict",
    "datasets",
    "peft",
    "hydra",
    "vllm.engine.arg_utils",
    "vllm.entrypoints.openai.cli_args",
]

# What stands for python: a program that starts in 20 ms, since it needs no library.
CLIENT = """\
#!{python} -IS
import json, os, signal, socket, sys
arguments = sys.argv[1:]
while arguments and arguments[0].startswith("-") and arguments[0] != "-c":  # such as -B, which the server has too
    arguments.pop(0)
numbers = [int(name) for name in os.listdir("/proc/self/fd") if os.path.lexists("/proc/self/fd/" + name)]
request = dict(arguments=arguments, environ=dict(os.environ), folder=os.getcwd(), numbers=numbers)
server = socket.socket(socket.AF_UNIX)
try:
    if arguments[0] != "-c" and not arguments[0].endswith(".py"):
        raise ValueError("neither a script nor code")
    server.connect({address!r})
    socket.send_fds(server, [b" "], numbers)
    server.sendall(json.dumps(request).encode() + b"\\n")
    replies = server.makefile()
    pid = int(replies.readline())
except (OSError, ValueError, IndexError):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: os.kill(pid, number))
code = int(replies.readline() or 1)  # nothing comes from a server that was ended first
if code < 0:
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextlib.contextmanager
def running(folder: str, environ: Mapping[str, str], log: IO[str]) -> Iterator[None]:
    """Run a server for ``FOLDER/python`` with an environment; what it prints goes to ``log``."""
    program = Path(folder, "python")
    program.write_text(CLIENT.format(python=sys.executable, address=f"{folder}/fork_server"))
    program.chmod(0o700)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder}/fork_server")
    listener.listen(64)  # who comes while the modules are being imported waits
    command = [sys.executable, "-m", "recipe.asyppo.fork_server", str(program), str(listener.fileno())]
    with (
        listener,
        subprocess.Popen(
            command, env=environ, stdout=log, stderr=log, process_group=0, pass_fds=[listener.fileno()]
        ) as server,
    ):
        listener.close()
        try:
            yield
        finally:
            server.kill()


def serve(listener: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork an attendant for every client; returns, in each process that is asked for, the request and the files with it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for an attendant
    while True:
        client, _ = listener.accept()
        pid = None
        with contextlib.suppress(OSError):  # too many processes: the client becomes python itself
            pid = os.fork()
        if pid == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return attend(client)
        client.close()


def attend(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork what a client asks for, and see it through: say its number, end it with the client, say its exit code."""
    with contextlib.suppress(OSError):  # the client is gone, or there are too many processes
        _, files, _, _ = socket.recv_fds(client, 1, 253)
        with client.makefile() as lines:
            line = lines.readline()
        if line and (pid := os.fork()) == 0:
            os.setpgid(0, 0)  # Ray ends a worker with all of its process group
            client.close()
            return json.loads(line), files
        if line:  # a client that was killed asks for nothing
            for file in files:
                os.close(file)
            with contextlib.suppress(OSError):
                client.sendall(b"%d\n" % pid)
            ended, _, _ = select.select([client.fileno(), os.pidfd_open(pid)], [], [])
            if client.fileno() in ended:  # which says nothing more: it was killed
                os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            client.sendall(b"%d\n" % code)
    os._exit(0)


def become(request: Mapping[str, Any], files: list[int]) -> None:
    """Take over the client's files, environment, folder and number of threads; random numbers are this process's own."""
    import numpy

    # Out of the way first: a file's number here may be that of another one there. What libraries have open stays, as NVML's.
    spare = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 1000) for file in files]
    for file, number in zip(spare, request["numbers"], strict=True):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["folder"])
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(":") if path and path not in sys.path]
    set_threads()
    # Ray says it late, when a worker gets its first task, and before torch would be imported.
    wrapt.register_post_import_hook(
        lambda module: wrapt.wrap_function_wrapper(module, "set_omp_num_threads_if_unset", then_set_threads),
        "ray._private.utils",
    )
    numpy.random.seed()


def set_threads() -> None:
    """Let torch use as many threads as ``OMP_NUM_THREADS`` says, which is read only once, when torch is loaded."""
    import torch

    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))


def then_set_threads(wrapped, _instance, args, kwargs):
    result = wrapped(*args, **kwargs)
    set_threads()
    return result


def run(arguments: list[str]) -> None:
    """Do what ``python ARGUMENTS`` does: run a script, or the code after ``-c``."""
    main = sys.modules["__main__"] = ModuleType("__main__")
    if arguments[0] == "-c":
        sys.argv, sys.path[0], source, name = ["-c", *arguments[2:]], "", arguments[1], "<string>"
    else:
        sys.argv, sys.path[0], name = arguments, os.path.dirname(os.path.abspath(arguments[0])), arguments[0]
        source, main.__file__ = Path(name).read_text(), name
    exec(compile(source, name, "exec"), vars(main))


def has_started_cuda() -> bool:
    """True if this process has asked CUDA's driver for anything; NVML, which vLLM asks, does not need that device file."""
    import psutil
    import torch

    return torch.cuda.is_initialized() or any("nvidia-uvm" in m.path for m in psutil.Process().memory_maps())


def main() -> None:
    program, listener = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with the process that started it
    multiprocessing.set_executable(program)
    if cpu.is_selected():
        cpu.set_environment()
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ.setdefault(
        "VLLM_LOGGING_LEVEL", "WARN"
    )  # as verl tells its workers, and read only when vLLM is imported
    for name in [*MODULES, f"vllm.v1.worker.{'cpu' if cpu.is_selected() else 'gpu'}_worker"]:
        importlib.import_module(name)
    if has_started_cuda():
        sys.exit("fork_server: an import has started CUDA")
    request, files = serve(listener)
    become(request, files)
    run(request["arguments"])


if __name__ == "__main__":
    main()

"""Fork the Python processes of a run from one that has imported what all of them need: ``fork_server SOCKET [MODULE ...]``.

A run on a CPU has nine processes that import torch, transformers and verl, for eight seconds each. Here the first two are
imported once. What is forked has the arguments, files, environment, folder and process group of the process that asked,
which waits for it (:mod:`sitecustomize` in ``startup``). Ends with the process that started it.
"""

import ast
import contextlib
import gc
import os
import runpy
import signal
import socket
import sys
import traceback
from select import select

from asyppo_verl import cpu

PRELOADED = (
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.modeling_utils",
    "datasets",
    "tensordict",
)
"""Not Ray, whose threads do not survive a fork, and so not verl."""


def main(path: str, *modules: str) -> None:
    """Listen at once, so that whoever asks early waits, then import, then fork."""
    starter = os.getppid()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        # What a worker of Ray is given; torch asks once.
        os.environ |= {"OMP_NUM_THREADS": "1", **cpu.ENVIRONMENT, **os.environ}
        for module in modules or PRELOADED:
            __import__(module)
        gc.freeze()  # else the first collection in each child would copy everything
        asking: dict[int, socket.socket] = {}
        while os.getppid() == starter:
            ready, _, _ = select([listener, *asking.values()], [], [], 0.05)
            if listener in ready:
                connection, _ = listener.accept()
                child = _fork(connection, [listener, *asking.values()])
                asking[child] = connection
                connection.sendall(child.to_bytes(4, "big"))
            for child, connection in list(asking.items()):
                if connection in ready:  # nothing is ever sent: the process that asked was killed
                    os.kill(child, signal.SIGKILL)
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    code = os.waitstatus_to_exitcode(status)
                    _reply(asking.pop(child), code if code >= 0 else 128 - code)


def _reply(connection: socket.socket, code: int) -> None:
    with connection, contextlib.suppress(BrokenPipeError):  # the process that asked may have been killed
        connection.sendall(bytes([code]))


def _fork(connection: socket.socket, others: list[socket.socket]) -> int:
    head, files, _, _ = socket.recv_fds(connection, 4, 16)
    request = connection.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
    child = os.fork()
    if child:
        for file in files:
            os.close(file)
        return child
    code = 1
    try:
        for other in [connection, *others]:
            other.close()
        _run(files, *ast.literal_eval(request.decode()))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(files: list[int], words: list[str], numbers: list[int], environment: dict, folder: str, group: int) -> None:
    """Become the process that asked, then do what ``python WORDS`` does."""
    kept = [os.dup2(file, 100 + index) for index, file in enumerate(files)]
    for file, number in zip(kept, numbers, strict=True):
        os.dup2(file, number)
    for file in {*files, *kept} - {*numbers}:
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.setpgid(0, group)
    while words[0].startswith("-") and words[0] != "-c":  # what the interpreter was asked for, this one has too
        words = words[1:]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A name of its own, in every Ray cluster, for the sockets on which verl's trainer sends weights to vLLM.

verl 0.9 calls them ``/tmp/rl-colocate-zmq-<Ray job>-replica-<r>-rank-<l>.sock``, but Ray counts jobs anew in each cluster:
two runs on one machine, each with a cluster of its own, share the name, and the weights of one can reach the vLLM of the
other. Here the id of the Ray node is added to the job's. Both ends take the name from a Ray worker on the same node: the
trainer's from its ``ServerAdapter``, vLLM's processes from the environment that ``vLLMHttpServer`` hands down to them.

This holds for every run, whatever its estimator: neither end knows that, a baseline beside an AsyPPO run must be as safe,
and the name of a socket has no meaning for training. It can go when verl's name differs between clusters.
"""

import functools
import os
from typing import Any

import wrapt

ID_LENGTH = 16
"""Hexadecimal digits of a random node id: far too many to meet again, few enough for a socket's path of 107 bytes."""


def install_sender(vllm_rollout: Any) -> None:
    """Rename the trainer's end in verl's module ``vllm_rollout``."""
    wrapt.wrap_function_wrapper(vllm_rollout, "ServerAdapter.__init__", _rename_sender)


def install_receiver(vllm_async_server: Any) -> None:
    """Rename vLLM's end in verl's module ``vllm_async_server``."""
    server = vllm_async_server.vLLMHttpServer
    init = server.__init__

    # A plain function: under a wrapt wrapper Ray finds, and calls, verl's own.
    @functools.wraps(init)
    def renamed(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)  # starts no process of vLLM's yet
        os.environ["VERL_RAY_JOB_ID"] = _job_ids()[1]

    server.__init__ = renamed


def _rename_sender(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    wrapped(*args, **kwargs)
    job, unique_job = _job_ids()
    instance.zmq_handle = instance.zmq_handle.replace(f"-{job}-", f"-{unique_job}-", 1)


def _job_ids() -> tuple[str, str]:
    """Ray's id of the job, which other clusters have too, and one that no other cluster has."""
    import ray

    context = ray.get_runtime_context()
    job = context.get_job_id()
    return job, f"{job}-{context.get_node_id()[:ID_LENGTH]}"

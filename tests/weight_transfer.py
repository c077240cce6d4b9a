"""Both ends of verl's weight transfer in a Ray cluster of this process: ``python tests/weight_transfer.py TOY VALUE``.

vLLM's end waits for weights from the start; the trainer's sends VALUE once a line comes in on standard input. Prints
"ready", then as JSON the path that each end has and the value that arrived.
"""

import asyncio
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import ray
import torch
from conftest import composing, overrides_for
from verl.workers.rollout.replica import RolloutMode
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver, BucketedWeightSender
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter


def transfer(toy: Path, value: float) -> dict:
    config = composing(overrides_for(toy))().actor_rollout_ref
    os.environ |= {"RANK": "0", "RAY_LOCAL_WORLD_SIZE": "1"}
    server = ray.remote(vLLMHttpServer).remote(
        config.rollout, config.model, RolloutMode.HYBRID, [], 0, 0, 1, 1, cuda_visible_devices=""
    )
    # What a process of vLLM's asks for, which has the server's environment.
    names = ("VERL_REPLICA_RANK", "VERL_RAY_JOB_ID")
    os.environ |= ray.get(server.__ray_call__.remote(lambda _: {name: os.environ[name] for name in names}))
    receiver = BucketedWeightReceiver(
        vLLMColocateWorkerExtension._get_zmq_handle(SimpleNamespace(local_rank=0, model_runner=None)),
        torch.device("cpu"),
        use_shm=True,
    )
    received = {}
    receiving = threading.Thread(
        target=receiver.receive_weights, args=[lambda weights, _: received.update(weights)], daemon=True
    )
    receiving.start()
    while receiver.socket is None:
        time.sleep(0.01)
    print("ready", flush=True)
    sys.stdin.readline()
    handle = ServerAdapter(config.rollout, config.model, device_mesh=None).zmq_handle
    sender = BucketedWeightSender(handle, bucket_size_mb=1, use_shm=True)
    asyncio.run(sender.async_send_weights(iter([("weight", torch.tensor([value]))])))
    receiving.join(10)
    return {"sender": handle, "receiver": receiver.zmq_handle, "received": received["weight"].item()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="asyppo-ray-") as folder:
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        print(json.dumps(transfer(Path(sys.argv[1]), float(sys.argv[2]))))
        ray.shutdown()

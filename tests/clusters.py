"""A Ray cluster of a test module's own, on request with verl's TransferQueue."""

import contextlib
import sys
import tempfile
from collections.abc import Iterator

import ray
import transfer_queue as tq
from hydra import compose, initialize_config_module


@contextlib.contextmanager
def started(*by_value: str, queue: bool = False) -> Iterator[None]:
    """Start Ray, whose workers get the classes of the given test modules by value.

    CPUs and GPUs are logical: what a group of ranks was given stays given when its processes have ended.
    """
    for module in by_value:
        ray.cloudpickle.register_pickle_by_value(sys.modules[module])
    # A short path, since Ray's sockets live below it.
    with tempfile.TemporaryDirectory(prefix="asyppo-ray-") as folder:
        ray.init(address="local", num_cpus=96, num_gpus=32, include_dashboard=False, _temp_dir=folder)
        if queue:
            units = "transfer_queue.backend.SimpleStorage.num_data_storage_units=1"
            with initialize_config_module("verl.trainer.config", version_base=None):
                tq.init(compose("ppo_trainer", [units, "++transfer_queue.enable=True"]).transfer_queue)
        yield
        if queue:
            tq.close()
        ray.shutdown()

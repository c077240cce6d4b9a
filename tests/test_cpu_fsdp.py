"""FSDP2 on a CPU, where moving to the host moves nothing: what verl relies on holds there too."""

import pytest
import torch
import torch.distributed as dist
import verl  # noqa: F401  (its plugins choose the platform)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from verl.utils import fsdp_utils


@pytest.fixture
def mesh():
    """One process that is all ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_weights_put_aside_come_back_after_training(mesh):
    model = torch.nn.Linear(3, 2)
    fully_shard(model, mesh=mesh)
    before = model.weight.full_tensor().clone()
    state, spec = fsdp_utils.fsdp2_sharded_save_to_cpu(model)
    with torch.no_grad():
        model.weight.mul_(3)
    assert not torch.equal(model.weight.full_tensor(), before)
    fsdp_utils.fsdp2_sharded_load_from_cpu(model, state, spec)
    assert torch.equal(model.weight.full_tensor(), before)


def test_a_model_in_host_memory_computes_what_it_did(mesh):
    model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    expected = model(x).detach()
    fully_shard(model, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=True))
    torch.testing.assert_close(model(x), expected)

"""Logical CPUs: counted as verl asks for them, refused or said where Ray would have too few, which verl waits for in silence."""

import importlib.util
import sys

from test_bad_input import driver, refusal

from asyppo_verl.preflight import gpus


def test_logical_cpus_are_counted_as_verl_asks_for_them(compose):
    """Three for each GPU of a pool, two for a rollout's own, one for each of TransferQueue's actors."""
    units = "transfer_queue.backend.SimpleStorage.num_data_storage_units"

    def needed(*overrides: str) -> int:
        return sum(gpus.needed_cpus(compose(*overrides)).values())

    assert needed(f"{units}=1") == 3 + 1 + 1
    assert needed() == 3 + 1 + 8
    assert needed("trainer.n_gpus_per_node=8", "trainer.nnodes=2") == 3 * 16 + 1 + 8
    assert needed("+asyppo.placement=pool", "+asyppo.pool.n_gpus_per_node=2") == 3 + 3 * 2 + 1 + 8
    separate = ("trainer.v1.trainer_mode=separate_async", "actor_rollout_ref.rollout.nnodes=1")
    assert needed(*separate, "actor_rollout_ref.rollout.n_gpus_per_node=4") == 3 + 2 * 4 + 1 + 8
    model = ("reward.reward_model.enable_resource_pool=True", "reward.reward_model.nnodes=1")
    assert needed(*model, "reward.reward_model.n_gpus_per_node=2") == 3 + 3 * 2 + 1 + 8
    assert needed("reward.reward_manager.name=remote", "reward.num_workers=4") == 3 + 1 + 8 + 16


def test_verls_program_with_another_estimator_is_warned_that_it_would_wait_for_ever(compose, caplog, monkeypatch):
    settings = ("algorithm.adv_estimator=grpo", "+asyppo={pool: {n_gpus_per_node: four}}")
    settings += ("+ray_kwargs.ray_init.address=local",)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", importlib.util.find_spec("verl.trainer.main_ppo"))
    driver(compose(*settings, "ray_kwargs.ray_init.num_cpus=12"))
    assert "logical CPUs" not in caplog.text
    driver(compose(*settings, "ray_kwargs.ray_init.num_cpus=11"))
    assert "num_cpus=11 is below the 12 logical CPUs without which verl hangs" in caplog.text


def test_too_few_logical_cpus_are_refused(compose, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    message = refusal(compose("ray_kwargs.ray_init.num_cpus=11"))
    assert "ray_kwargs.ray_init.num_cpus=11 is below the 12 logical CPUs" in message
    assert "set ray_kwargs.ray_init.num_cpus=12" in message and "8 (transfer_queue.backend" in message
    driver(compose("ray_kwargs.ray_init.num_cpus=12"))
    monkeypatch.setattr(gpus, "get_num_cpus", lambda _quiet: 11)
    assert "num_cpus=None (the 11 cores of this machine)" in refusal(compose("ray_kwargs.ray_init.num_cpus=null"))
    # An existing cluster is not ours to count.
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:6379")
    driver(compose("ray_kwargs.ray_init.num_cpus=null"))
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    driver(compose("ray_kwargs.ray_init.num_cpus=null"))
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    driver(compose("ray_kwargs.ray_init.num_cpus=1"))
    assert "below the 12" in refusal(compose("ray_kwargs.ray_init.num_cpus=1", "+ray_kwargs.ray_init.address=local"))

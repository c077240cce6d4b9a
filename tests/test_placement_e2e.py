"""The same recorded rollouts, trained on with the critics in each placement: the results, and who works when."""

import pytest
import torch
from safetensors.torch import load_file
from training import replaying, train

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

STEPS = 2
PLACEMENTS = {
    # placement: (overrides, who has to be at work at the same time)
    "colocated": ([], None),
    "pool": (["+asyppo.placement=pool", "+asyppo.pool.n_gpus_per_node=1"], {"actor", "critics_0_1"}),
    "split": (["+asyppo.placement=split", "+asyppo.pool.n_gpus_per_node=2"], {"actor", "critics_0", "critics_1"}),
}


ON_TWO_RANKS = {
    "colocated": [],
    "split": ["+asyppo.placement=split", "+asyppo.pool.n_gpus_per_node=2"],
}
"""Placements of critics beside an actor on two ranks: a critic has two ranks, or one."""


@pytest.fixture(scope="module")
def replays(root, toy, finished, tmp_path_factory):
    """Metrics and folder of each placement's run, all on the rollouts that the finished run recorded."""
    folder = tmp_path_factory.mktemp("placements")
    found = {}
    for name, (overrides, together) in PLACEMENTS.items():
        environment = {}
        if together:
            environment = {
                "VERL_USE_EXTERNAL_MODULES": "rendezvous",
                "PYTHONPATH": str(root / "tests"),
                "RENDEZVOUS_DIR": str(folder / name / "rendezvous"),
                "RENDEZVOUS_PARTIES": str(len(together)),
            }
        metrics = replayed(root, toy, finished, folder / name, *overrides, **environment)
        found[name] = metrics, folder / name
    return found


def replayed(root, toy, finished, run_dir, *overrides: str, **environment: str) -> list[dict]:
    """Metrics of a run on the rollouts of the finished one."""
    saving = [f"trainer.total_training_steps={STEPS}", f"trainer.save_freq={STEPS}", "algorithm.lam=0.95"]
    metrics, _ = train(root, toy, run_dir, *replaying(finished[0] / "rollouts"), *saving, *overrides, **environment)
    return metrics


def weights(folder) -> dict[str, torch.Tensor]:
    """Everything that the run saved of the actor and the critics, by model and parameter."""
    saved = {}
    for path in sorted((folder / f"checkpoints/global_step_{STEPS}").rglob("model_world_size_1_rank_0.pt")):
        for name, value in torch.load(path, weights_only=False).items():
            saved[f"{path.parent.name}/{name}"] = value.to_local() if hasattr(value, "to_local") else value
    return saved


@pytest.mark.parametrize("placement", ["pool", "split"])
def test_the_placement_changes_no_bit_of_the_result(replays, placement):
    """Each critic has one rank in all three runs, so that every sum is taken in the same order."""
    expected, found = (weights(replays[name][1]) for name in ("colocated", placement))
    assert {name.split("/")[0] for name in expected} == {"actor", "critic_0", "critic_1"}
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    for before, after in zip(replays["colocated"][0], replays[placement][0], strict=True):
        trained = [key for key in before if key.startswith(("actor/", "critic/", "asyppo/")) and "/perf/" not in key]
        assert len(trained) > 40
        for key in trained:
            # These are summed in the order of the rows' keys, which verl draws anew at every replay.
            is_of_all_rows = key.startswith(
                ("asyppo/explained_var", "asyppo/sigma/mean", "asyppo/critic_corr", "asyppo/adv_abs", "asyppo/mask/")
            )
            is_of_all_rows |= key.endswith("/explained_var")
            assert after[key] == (pytest.approx(before[key], rel=1e-4) if is_of_all_rows else before[key]), key


def test_actor_and_critics_were_trained(replays, toy):
    """Otherwise the comparison above would prove nothing."""
    trained = weights(replays["colocated"][1])
    for model in ("actor", "critic_0", "critic_1"):
        started = load_file(toy / model.split("_")[0] / "model.safetensors")
        (name,) = [name for name in started if name.endswith("layers.0.mlp.up_proj.weight")]
        assert not torch.equal(trained[f"{model}/{name}"], started[name].float()), model


@pytest.mark.parametrize("placement", ["pool", "split"])
def test_critics_with_gpus_of_their_own_work_while_the_actor_does(replays, placement):
    """Nobody passed its evaluation or its update before all others had begun theirs, or the run would have stopped."""
    met = {path.name: {who.name for who in path.iterdir()} for path in (replays[placement][1] / "rendezvous").iterdir()}
    together = PLACEMENTS[placement][1]
    assert met == {f"{event}_{step}": together for event in ("evaluation", "update") for step in range(1, STEPS + 1)}


def test_the_number_of_a_critics_ranks_changes_the_order_of_summation_only(root, toy, finished, tmp_path):
    """Two mini-batches a step and two steps: the same responses train together, whatever the ranks."""
    colocated, split = (
        replayed(root, toy, finished, tmp_path / name, *overrides, RANKS="2")
        for name, overrides in ON_TWO_RANKS.items()
    )
    for before, after in zip(colocated, split, strict=True):
        for key in (
            f"asyppo/critic_{m}/{name}" for m in range(2) for name in ("vf_loss", "grad_norm", "explained_var")
        ):
            assert after[key] == pytest.approx(before[key], rel=1e-3), key
        for key in ("critic/vf_loss", "asyppo/sigma/mean", "asyppo/adv_masked_fraction", "actor/grad_norm"):
            assert after[key] == pytest.approx(before[key], rel=1e-4), key

"""A critic-only run: it starts from exported models, trains the critics and leaves the actor as it is."""

import pytest
import torch
from test_critics import same
from test_export import critic, on_responses, saved_by_one_rank
from training import replaying, train
from transformers import AutoModelForCausalLM

from asyppo_verl.export import export


def check_first_values(step: dict, data, critics: list[torch.nn.Module]) -> None:
    """The logged mean and disagreement of the first step are those of the critics that the run started from."""
    is_response = data["response_mask"].values().bool()
    values = torch.stack([on_responses(model, data)[is_response, 0] for model in critics])
    assert step["critic/values/mean"] == pytest.approx(values.mean().item(), rel=1e-5)
    assert step["asyppo/sigma/mean"] == pytest.approx(values.std(0, correction=0).mean().item(), rel=1e-5)


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_a_run_from_exported_models_trains_the_critics_and_leaves_the_actor_alone(finished, root, toy, tmp_path):
    first, again, rollouts = tmp_path / "first", tmp_path / "again", tmp_path / "rollouts"
    assert export(finished[0], first) == ["actor", "critic_0", "critic_1"]
    actor = AutoModelForCausalLM.from_pretrained(first / "actor").eval()
    assert same(saved_by_one_rank(finished[0] / "checkpoints/global_step_2/actor"), actor.state_dict())

    steps, _ = train(
        root,
        toy,
        tmp_path / "run",
        "trainer.critic_warmup=1000000",
        f"actor_rollout_ref.model.path={first}/actor",
        f"critic.model.path={first}/critic_0",
        f"+asyppo.critic_overrides.1.model.path={first}/critic_1",
        "trainer.total_training_steps=2",
        "trainer.save_freq=2",
        *replaying(rollouts),
    )
    sampled = [torch.load(path, weights_only=False)["tensordict"] for path in sorted(rollouts.glob("**/*.pt"))]
    assert len(steps) == len(sampled) == 2
    check_first_values(steps[0], sampled[0], [critic(first / f"critic_{index}") for index in range(2)])

    export(tmp_path / "run", again)
    after = AutoModelForCausalLM.from_pretrained(again / "actor").state_dict()
    assert same(actor.state_dict(), after) and not any("actor/grad_norm" in step for step in steps)
    for data in sampled:
        log_probs = on_responses(actor, data).log_softmax(-1).gather(-1, data["responses"].values()[:, None])[:, 0]
        torch.testing.assert_close(log_probs, data["rollout_log_probs"].values(), rtol=1e-5, atol=1e-5)
    for name in ("critic_0", "critic_1"):
        before, after = (critic(folder / name).state_dict() for folder in (first, again))
        assert not any(torch.equal(before[key], after[key]) for key in before if key.endswith("weight")), name

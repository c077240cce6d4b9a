"""Batches as they should not be, on verl's real TransferQueue: refused before anything is trained, or trained on whole."""

import math

import pytest
import torch
import transfer_queue as tq
from tensordict import TensorDict
from test_trainer import (
    RAGGED,
    clean,  # noqa: F401  a fixture
    force_values,
    put_rows,
    step,
    stored,
    trainer_for,
    transfer_queue,  # noqa: F401  a fixture
)
from transfer_queue import KVBatchMeta

from asyppo_verl import batch_checks, batch_io

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("clean")]


def write(batch: KVBatchMeta, field: str, key: str, row: torch.Tensor) -> None:
    """Replace a field of one row."""
    fields = TensorDict({field: torch.nested.as_nested_tensor([row], layout=torch.jagged)}, batch_size=1)
    tq.kv_batch_put(keys=[key], partition_id="train", fields=fields)


def refused(trainer, batch: KVBatchMeta, values: dict, *fragments: str) -> None:
    with pytest.raises(ValueError) as caught:
        step(trainer, batch, values)
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments) and "\n" not in message, message
    assert not trainer.critic_wg.calls, "a critic was trained"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("critic", [0, 1])
def test_values_that_are_not_finite_name_the_critic(compose, value, critic):
    batch = put_rows(RAGGED)
    values = force_values(batch, 2)
    values["dd_2_1"][critic][0] = value
    refused(trainer_for(compose), batch, values, f"mini-critic {critic}", "step 1", "critic.optim.lr")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_critics", [1, 2])
def test_rewards_that_are_not_finite_name_the_response(compose, value, num_critics):
    batch = put_rows(RAGGED)
    values = force_values(batch, num_critics)
    reward = stored(batch, "rm_scores")["bb_1_0"].clone()
    reward[-1] = value
    write(batch, "rm_scores", "bb_1_0", reward)
    trainer = trainer_for(compose, f"+asyppo.num_critics={num_critics}")
    refused(trainer, batch, values, "1 of ", "step 1", "bb_1_0", "reward.custom_reward_function.path")


def test_a_batch_without_response_tokens(compose):
    batch = put_rows(RAGGED)
    for key, mask in stored(batch, "response_mask").items():
        write(batch, "response_mask", key, torch.zeros_like(mask))
    refused(trainer_for(compose), batch, force_values(batch, 2), "step 1", "no response token", "response_mask")


def test_a_batch_without_rows(compose):
    empty = KVBatchMeta(partition_id="train", keys=[], tags=[])
    refused(trainer_for(compose), empty, {"": [torch.zeros(1)] * 2}, "step 1", "every rollout failed")


def test_a_group_without_any_response_is_no_obstacle(compose):
    batch = put_rows({"aa": [1, 1, 1, 1], "bb": [0, 0, 0, 0]})
    trainer = trainer_for(compose)
    _, metrics = step(trainer, batch, force_values(batch, 2))
    assert metrics["asyppo/critic_0/responses"] == metrics["asyppo/critic_1/responses"] == 2


def test_a_response_of_length_zero_is_trained_beside_the_others(compose):
    """It has no token to learn from; the others' values and advantages are what they are without it."""
    batch = put_rows(RAGGED)
    values, key = force_values(batch, 2), "aa_2_0"
    for field in ("responses", "response_mask", "loss_mask", "rm_scores"):
        write(batch, field, key, stored(batch, field)[key][:0])
    write(batch, "input_ids", key, stored(batch, "prompts")[key])
    write(batch, "position_ids", key, torch.arange(len(stored(batch, "prompts")[key])))
    values[key] = [row[:0] for row in values[key]]
    trainer = trainer_for(compose)
    batch, metrics = step(trainer, batch, values)
    trained = [k for call in trainer.critic_wg.calls for k in call.keys if k in values]
    assert sorted(trained) == sorted(values)
    advantages = stored(batch, "advantages")
    assert len(advantages[key]) == 0 and all(torch.isfinite(row).all() for row in advantages.values())
    tokens = sum(int(mask.sum()) for mask in stored(batch, "response_mask").values())
    assert metrics["asyppo/adv_masked_fraction"] == pytest.approx(math.floor(0.2 * tokens) / tokens)
    assert batch_io.KEEP_ENTROPY not in batch.fields


def test_critics_that_explain_nothing_while_they_mask_are_named_once(compose, caplog, monkeypatch):
    """Values that say nothing of the rewards, for two steps: then one warning with what to try; without selections none."""
    monkeypatch.setattr(batch_checks, "STEPS_TO_LEARN", 2)
    for masks, filters, expected in ((0.2, 0.2, 1), (0.0, 0.2, 1), (0.2, 0.0, 1), (0.0, 0.0, 0)):
        fractions = f"+asyppo.adv_mask_fraction={masks}", f"+asyppo.entropy_filter_fraction={filters}"
        trainer = trainer_for(compose, *fractions)
        caplog.clear()
        for _ in range(4):
            batch = put_rows(RAGGED)
            step(trainer, batch, {key: [-100 * x for x in row] for key, row in force_values(batch, 2).items()})
        said = [record.getMessage() for record in caplog.records if "explain nothing" in record.getMessage()]
        assert len(said) == expected and all("trainer.critic_warmup" in message for message in said)


def test_one_bad_step_does_not_make_critics_blind(caplog, monkeypatch):
    """Where returns are nearly equal the explained variance is far below 0: the median forgets that, a mean does not."""
    monkeypatch.setattr(batch_checks, "STEPS_TO_LEARN", 3)
    assert not batch_checks.warn_of_blind_critics([0.5, -900.0, 0.4], 3) and not caplog.records
    assert batch_checks.warn_of_blind_critics([0.0, 0.9, 0.01], 3)
    assert "steps 1 to 3" in caplog.text and "median of asyppo/explained_var 0.010" in caplog.text

"""The one-page method against verl: same responses and values, so the same losses and gradients, in float32.

``test_trainer.py::test_the_one_page_method_is_the_trainers`` does it for advantages, selections and targets.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import compute_gae_advantage_return, compute_grpo_outcome_advantage
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import value_loss

from asyppo_verl.actor_loss import asyppo_actor_loss
from asyppo_verl.batch_io import KEEP_ENTROPY
from recipe.asyppo import one_page
from recipe.asyppo.one_page import Settings

# Sums may be taken in another order.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}
B, WIDTH, PROMPT = 8, 9, 3


def jagged(x_BT: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([row[:n] for row, n in zip(x_BT, lengths, strict=True)], layout=torch.jagged)


def test_grpo_is_verls():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.zeros(B, WIDTH)
    rewards[:, -1] = torch.randint(2, (B,), generator=generator).float()
    mask = torch.ones(B, WIDTH, dtype=torch.bool)
    theirs, _ = compute_grpo_outcome_advantage(rewards.clone(), mask, np.repeat(np.arange(B // 4), 4))
    ours, *_ = one_page.credit(Settings(num_critics=0, responses=4), rewards, rewards[None][:0], mask)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert theirs.any()


@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_gae_is_verls(lam):
    case = Batch()
    rewards = case.returns[0] * case.is_response[0]
    theirs = compute_gae_advantage_return(rewards, case.now[0], case.is_response[0].float(), gamma=1.0, lam=lam)
    ours = one_page.gae(rewards, case.now[0], case.is_response[0], lam)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine * case.is_response[0], other * case.is_response[0], **CLOSE)


class Batch:
    """Two runs' responses, what the models said of them before, and what they say now."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(1, WIDTH + 1, (2, B), generator=generator)
        self.lengths[:, 0] = WIDTH
        self.is_response = torch.arange(WIDTH) < self.lengths[..., None]
        self.old, self.now = (-2 * torch.rand(2, B, WIDTH, generator=generator) for _ in range(2))
        self.advantages, self.returns = (torch.randn(2, B, WIDTH, generator=generator) for _ in range(2))
        self.entropy = torch.rand(2, B, WIDTH, generator=generator)
        self.keep = torch.rand(2, B, WIDTH, generator=generator) < 0.7

    def tensordict(self, run: int, **fields: torch.Tensor) -> TensorDict:
        lengths = self.lengths[run].tolist()
        data = TensorDict(
            {
                "prompts": torch.nested.as_nested_tensor([torch.zeros(PROMPT).long()] * B, layout=torch.jagged),
                "responses": jagged(torch.zeros(B, WIDTH).long(), lengths),
                **{name: jagged(field, lengths) for name, field in fields.items()},
            },
            batch_size=B,
        )
        tokens = int(fields["response_mask"].sum())
        tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=tokens, global_batch_size=B)
        return data

    def on_sequences(self, run: int, x_BT: torch.Tensor) -> torch.Tensor:
        """Outputs of a model on whole sequences; those before a response token are the given ones."""
        rows = [
            torch.cat([torch.zeros(PROMPT - 1), row[:n], torch.zeros(1)])
            for row, n in zip(x_BT, self.lengths[run].tolist(), strict=True)
        ]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize("seed", range(3))
def test_the_actors_loss_and_gradients_are_those_of_verl(compose, seed):
    case, beta = Batch(seed), 0.01
    config = compose(
        f"actor_rollout_ref.actor.entropy_coeff={beta}", "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"
    )
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    now, entropy = case.now.clone().requires_grad_(), case.entropy.clone().requires_grad_()
    bonus = beta * one_page.asyppo.filter_entropy(entropy, case.keep)
    ours = one_page.actor_loss(now, bonus, case.old, case.advantages, case.is_response)
    ours.sum().backward()
    for run in range(2):
        theirs_now, theirs_entropy = case.now[run].clone().requires_grad_(), case.entropy[run].clone().requires_grad_()
        data = case.tensordict(
            run,
            response_mask=case.is_response[run].long(),
            old_log_probs=case.old[run],
            advantages=case.advantages[run],
            **{KEEP_ENTROPY: case.keep[run]},
        )
        output = {
            "log_probs": case.on_sequences(run, theirs_now),
            "entropy": case.on_sequences(run, theirs_entropy),
        }
        loss, metrics = asyppo_actor_loss(actor, output, data)
        loss.backward()
        torch.testing.assert_close(ours[run], loss, **CLOSE)
        torch.testing.assert_close(now.grad[run], theirs_now.grad, **CLOSE)
        torch.testing.assert_close(entropy.grad[run], theirs_entropy.grad, **CLOSE)
        assert metrics["actor/pg_clipfrac"].aggregate() > 0


def test_a_critic_without_a_response_in_a_mini_batch_learns_nothing_from_it():
    case = Batch()
    now, is_own = case.now.clone().requires_grad_(), case.is_response.clone()
    is_own[1] = False
    loss = one_page.critic_loss(now, case.old, case.returns, is_own)
    loss.sum().backward()
    assert loss[0] > 0 == loss[1] and now.grad[0].any() and not now.grad[1].any()


@pytest.mark.parametrize("seed", range(3))
def test_the_critics_loss_and_gradients_are_those_of_verl(compose, seed):
    """The stack is one run with two critics; verl's critic gets the rows of its shard alone."""
    case = Batch(seed)
    config = omega_conf_to_dataclass(compose().critic)
    is_own_SB1 = torch.stack([torch.arange(B) % 2 == m for m in range(2)])[..., None]
    case.lengths[1], case.is_response[1] = case.lengths[0], case.is_response[0]
    now = case.now.clone().requires_grad_()
    ours = one_page.critic_loss(now, case.old, case.returns, case.is_response & is_own_SB1)
    ours.sum().backward()
    for critic in range(2):
        theirs = case.now[critic].clone().requires_grad_()
        is_own = case.is_response[critic] & is_own_SB1[critic]
        data = case.tensordict(
            critic, response_mask=is_own.long(), values=case.old[critic], returns=case.returns[critic]
        )
        loss, metrics = value_loss(config, {"values": case.on_sequences(critic, theirs)}, data)
        loss.backward()
        torch.testing.assert_close(ours[critic], loss, **CLOSE)
        torch.testing.assert_close(now.grad[critic], theirs.grad, **CLOSE)
        assert metrics["critic/vf_clipfrac"] > 0


def small(seed: int, count: int) -> one_page.Models:
    weights = [one_page.new_weights((16, 1), one_page.V, seed=seed + index) for index in range(count)]
    return one_page.Models(weights, [1e-3] * count)


def test_stacked_models_compute_and_train_apart():
    """Each model of a stack gives what it gives alone, before and after a step, whatever the others' learning rates."""
    torch.manual_seed(0)
    together, tokens = small(0, 3), torch.randint(one_page.V, (3, 4, one_page.P + one_page.T))
    together.lr_S[1] = 0.1
    for index in range(3):
        alone = small(index, 1)
        alone.lr_S[0] = together.lr_S[index]
        torch.testing.assert_close(alone(tokens[index : index + 1])[0], together(tokens)[index], **CLOSE)
    before = together(tokens)
    together.step((before**2).mean((1, 2, 3)))
    alone = small(1, 1)
    alone.lr_S[0] = 0.1
    alone.step((alone(tokens[1:2]) ** 2).mean((1, 2, 3)))
    for name, weight in alone.weights.items():
        torch.testing.assert_close(together.weights[name][1], weight[0], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(together(tokens), before)


def test_adam_is_torchs():
    ours, theirs = small(0, 1), small(0, 1)
    parameters = list(theirs.weights.values())
    torchs, tokens = torch.optim.Adam(parameters, lr=1e-3), torch.randint(one_page.V, (1, 4, one_page.P))
    for scale in (1.0, 1e-4, 1.0):  # the second gradient is too small to be clipped
        ours.step(scale * (ours(tokens) ** 2).mean((1, 2, 3)))
        torchs.zero_grad()
        (scale * (theirs(tokens) ** 2).mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        torchs.step()
    for name, weight in ours.weights.items():
        torch.testing.assert_close(weight, theirs.weights[name], rtol=1e-4, atol=1e-5)


def test_sampling_with_a_cache_is_the_forward_pass():
    torch.manual_seed(0)
    actors = small(0, 2)
    prompts = one_page.problems()[0][:10].unflatten(0, (2, 5))
    with torch.no_grad():
        tokens, log_probs, is_response = one_page.sample(actors, prompts)
        again = actors(tokens)[:, :, one_page.P - 1 : -1].log_softmax(-1)
    again = again.gather(-1, tokens[..., one_page.P :, None])[..., 0]
    torch.testing.assert_close(log_probs[is_response], again[is_response], **CLOSE)
    ends = (tokens[..., one_page.P :] == one_page.END) & is_response
    assert (ends.sum(-1) <= 1).all() and torch.equal(tokens[..., : one_page.P], prompts)
    assert torch.equal(is_response.sum(-1) == one_page.T, ~ends[..., :-1].any(-1))


def test_the_page_trains_all_three():
    torch.manual_seed(0)
    start = one_page.starting_actor(steps=2)
    for name, settings in one_page.ALGORITHMS.items():
        settings = replace(settings, prompts=2, critic_warmup=0)
        runs = [settings, replace(settings, actor_lr=0.0)]
        history = one_page.train(runs, start, steps=2, name=name)
        assert [len(step) for step in history] == [2, 2]
        assert all(0 <= run["reward"] <= 1 for step in history for run in step)
        assert ("asyppo/critic_1/explained_var" in history[0][0]) == (name == "AsyPPO")


def test_an_update_is_of_the_credit_that_was_given(monkeypatch):
    """The actor gets the advantages, and a bonus for kept tokens' entropy; each response goes to one critic, and its returns."""
    torch.manual_seed(0)
    settings = replace(one_page.ALGORITHMS["AsyPPO"], prompts=2, critic_warmup=0, mini_batches=1, epochs=1)
    seen: dict[str, list] = {"credit": [], "actor_loss": [], "critic_loss": []}

    def noted(name, function, *values):
        seen[name].append((values, function(*values)))
        return seen[name][-1][1]

    for name in seen:
        monkeypatch.setattr(one_page, name, partial(noted, name, getattr(one_page, name)))
    one_page.train([settings], one_page.starting_actor(steps=2), steps=1)
    (((_, _, values, is_response), (advantages, returns, keep, _)),) = seen["credit"]
    _, bonus, _, given, _ = seen["actor_loss"][0][0]
    assert torch.equal(given[0], advantages) and (bonus >= 0).all() and not bonus[0][~keep].any()
    _, old_values, targets, is_own = seen["critic_loss"][0][0]
    assert torch.equal(old_values, values) and torch.equal(targets, returns.expand_as(targets))
    assert torch.equal(is_own.sum(0), is_response.long())


def test_the_page_is_one_page(root):
    assert len((root / "recipe/asyppo/one_page.py").read_text().splitlines()) <= 250

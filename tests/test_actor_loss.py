"""Law 5 on verl's own loss: which token gets which gradient, in every policy loss mode."""

import copy

import pytest
import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss

from asyppo_verl.actor_loss import asyppo_actor_loss
from asyppo_verl.asyppo import mask_advantage
from asyppo_verl.batch_io import KEEP_ENTROPY

PROMPTS, RESPONSES = [3, 1, 5], [4, 2, 6]
TOKENS = sum(RESPONSES)


def jagged(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def rows(flat: torch.Tensor) -> torch.Tensor:
    """A vector over response tokens as a jagged (B, T) tensor."""
    return jagged(list(flat.split(RESPONSES)))


class Case:
    """A batch of three responses with observation tokens, and the model outputs that belong to it."""

    def __init__(self, config, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.config = config
        self.is_response = torch.rand(TOKENS, generator=generator) < 0.8
        self.keep_adv = torch.rand(TOKENS, generator=generator) < 0.6
        self.keep_ent = torch.rand(TOKENS, generator=generator) < 0.6
        self.advantages = torch.randn(TOKENS, generator=generator)
        self.old = -torch.rand(TOKENS, generator=generator)
        self.ref = -torch.rand(TOKENS, generator=torch.Generator().manual_seed(seed + 100))
        total = sum(PROMPTS) + TOKENS
        self.log_probs = -torch.rand(total, generator=generator)
        self.entropy = torch.rand(total, generator=generator)
        starts = torch.tensor([0, *[p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)][:-1]]).cumsum(0)
        # The output at the position before a token predicts it.
        self.position = torch.cat(
            [s + p - 1 + torch.arange(r) for s, p, r in zip(starts, PROMPTS, RESPONSES, strict=True)]
        )

    def gradients(self, loss_fn, advantages: torch.Tensor, has_entropy: bool = True) -> list[torch.Tensor]:
        """Gradients of the loss with respect to log-probability and entropy, if it is there, of every response token."""
        log_probs, entropy = self.log_probs.clone().requires_grad_(), self.entropy.clone().requires_grad_()
        offsets = torch.tensor([0, *[p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]]).cumsum(0)
        data = TensorDict(
            {
                "prompts": jagged([torch.zeros(p, dtype=torch.long) for p in PROMPTS]),
                "responses": jagged([torch.zeros(r, dtype=torch.long) for r in RESPONSES]),
                "response_mask": rows(self.is_response.long()),
                "old_log_probs": rows(self.old),
                "ref_log_prob": rows(self.ref),
                "advantages": rows(advantages),
                KEEP_ENTROPY: rows(self.keep_ent),
            },
            batch_size=3,
        )
        tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=int(self.is_response.sum()), global_batch_size=3)
        output = {"log_probs": torch.nested.nested_tensor_from_jagged(log_probs, offsets)}
        if has_entropy:
            output["entropy"] = torch.nested.nested_tensor_from_jagged(entropy, offsets)
        loss, _ = loss_fn(copy.deepcopy(self.config), output, data)
        loss.backward()
        return [x.grad[self.position] for x in (log_probs, entropy) if x.grad is not None]


@pytest.fixture
def actor_config(compose):
    def configured(*overrides: str):
        config = compose("actor_rollout_ref.actor.entropy_coeff=0.01", *overrides)
        return omega_conf_to_dataclass(config.actor_rollout_ref.actor)

    return configured


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_law_5_entropy(actor_config, mode):
    case = Case(actor_config(f"actor_rollout_ref.actor.loss_agg_mode={mode}"))
    plain_policy, plain_entropy = case.gradients(ppo_loss, case.advantages)
    policy, entropy = case.gradients(asyppo_actor_loss, case.advantages)
    used = case.keep_ent & case.is_response
    assert not entropy[~used].any(), "a filtered token got an entropy gradient"
    assert torch.equal(entropy[used], plain_entropy[used]) and plain_entropy[case.is_response].all()
    assert torch.equal(policy, plain_policy), "the entropy filter touched the policy gradient"


# Those in which a masked token gets nothing and the others what they had.
SEPARATE = ["vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "cispo", "bypass_mode"]
# Those that look at all tokens at once: a masked token gets nothing, but the others may change. Users are told.
COUPLED = ["clip_cov", "geo_mean"]
# A masked token may move: refused (dro), or pointed out (kl_cov).
LEAKING = ["dro", "kl_cov"]


def test_every_policy_loss_of_verl_is_classified():
    assert sorted(POLICY_LOSS_REGISTRY) == sorted([*SEPARATE, *COUPLED, *LEAKING])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss_mode", [*SEPARATE, *COUPLED])
def test_law_5_policy(actor_config, loss_mode, seed):
    policy_loss = "actor_rollout_ref.actor.policy_loss"
    own = [f"{policy_loss}.clip_cov_lb=-10", f"{policy_loss}.clip_cov_ratio=0.3"] if loss_mode == "clip_cov" else []
    case = Case(actor_config(f"{policy_loss}.loss_mode={loss_mode}", *own), seed)

    def gradients(case: Case, advantages: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)  # clip_cov draws tokens
        return case.gradients(asyppo_actor_loss, advantages)[0]

    plain = gradients(case, case.advantages)
    masked = gradients(case, mask_advantage(case.advantages, case.keep_adv))
    assert not masked[~(case.keep_adv & case.is_response)].any(), "a masked token got a policy gradient"
    if loss_mode in COUPLED:
        assert not torch.equal(plain, gradients(Case(actor_config(), seed), case.advantages)), (
            "no other mode than vanilla"
        )
    else:
        assert torch.equal(masked[case.keep_adv], plain[case.keep_adv]), "masking changed another token's gradient"
    assert plain[case.is_response].any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rollout_is", ["null", "token", "sequence"])
def test_law_5_in_bypass_mode_without_clipping(actor_config, rollout_is, seed):
    """REINFORCE with weights of the rollout correction: a masked token still gets nothing."""
    correction = "actor_rollout_ref.actor.policy_loss.rollout_correction"
    config = actor_config(
        "actor_rollout_ref.actor.policy_loss.loss_mode=bypass_mode",
        f"+{correction}.loss_type=reinforce",
        f"+{correction}.rollout_is={rollout_is}",
    )
    case = Case(config, seed)
    plain, _ = case.gradients(asyppo_actor_loss, case.advantages)
    masked, _ = case.gradients(asyppo_actor_loss, mask_advantage(case.advantages, case.keep_adv))
    used = case.keep_adv & case.is_response
    assert not masked[~used].any() and torch.equal(masked[used], plain[used]) and plain[case.is_response].any()


def test_the_kl_loss_still_acts_on_masked_and_filtered_tokens(actor_config):
    """It has nothing to do with advantages or entropy: its gradient is the same with and without the masks."""
    on = Case(actor_config("actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.kl_loss_coef=0.5"))
    off = Case(actor_config())
    advantages = mask_advantage(on.advantages, on.keep_adv)
    with_kl, entropy = on.gradients(asyppo_actor_loss, advantages)
    without_kl, entropy_without = off.gradients(asyppo_actor_loss, advantages)
    unmasked = on.gradients(ppo_loss, on.advantages)[0] - off.gradients(ppo_loss, off.advantages)[0]
    torch.testing.assert_close(with_kl - without_kl, unmasked)
    assert with_kl[~on.keep_adv & on.is_response].any() and not with_kl[~on.is_response].any()
    assert torch.equal(entropy, entropy_without)


def test_dro_would_move_masked_tokens(actor_config):
    config = actor_config(
        "actor_rollout_ref.actor.policy_loss.loss_mode=dro", "actor_rollout_ref.actor.policy_loss.dro_beta=0.5"
    )
    case = Case(config)
    masked, _ = case.gradients(asyppo_actor_loss, mask_advantage(case.advantages, case.keep_adv))
    assert masked[~case.keep_adv & case.is_response].any(), "dro is harmless now; stop refusing it"


@pytest.mark.parametrize("has_entropy", [True, False])
def test_where_no_token_is_filtered_the_loss_is_verls(actor_config, has_entropy):
    case = Case(actor_config())
    case.keep_ent[:] = True
    ours, verls = (case.gradients(loss, case.advantages, has_entropy) for loss in (asyppo_actor_loss, ppo_loss))
    assert len(ours) == 1 + has_entropy and all(map(torch.equal, ours, verls))

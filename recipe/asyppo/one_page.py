"""AsyPPO, PPO and GRPO on one page, from sampling to update: plain torch, no verl, no Ray.

``python -m recipe.asyppo.one_page`` trains all three in two to three minutes on two cores, or on a GPU, and draws one_page.png.
The method is :mod:`asyppo_verl.asyppo`, :func:`credit` is where the three differ, tests/test_one_page.py holds all to verl.

Shape suffixes: R runs trained at once; M critics; S models stacked for one computation (R actors, or R * M critics);
B responses; P, T, L positions of prompt, response, both; D width; V tokens.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

from asyppo_verl import asyppo
from asyppo_verl.metrics import ensemble_metrics, selection_metrics

ALPHABET = "\n =0123456789abcdefghijklmnopqrstuvwxyz"
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
END, V, P, T, ACTOR_SIZE = 0, len(ALPHABET), 4, 18, (64, 3)


@dataclass(frozen=True)
class Settings:
    """One run. Runs that train together have the first eight in common."""

    num_critics: int = 2  # M: 0 is GRPO, 1 is PPO, 2 or more is AsyPPO
    critic_size: tuple[int, int] = (32, 2)  # width and layers
    prompts: int = 32
    responses: int = 8  # to each prompt
    mini_batches: int = 4  # optimizer steps in one pass over a step's responses
    epochs: int = 1
    critic_warmup: int = 0  # steps in which only the critics learn
    entropy_coeff: float = 0.001  # beta
    actor_lr: float = 1e-4
    critic_lr: float = 4e-3
    adv_mask_fraction: float = 0.2  # k
    entropy_filter_fraction: float = 0.2  # h
    lam: float = 1.0
    critic_lam: float = 1.0
    shard: str = "group"


ALGORITHMS = {
    "GRPO": Settings(num_critics=0),
    "PPO": Settings(num_critics=1, critic_size=ACTOR_SIZE, critic_lr=2e-3, critic_warmup=40),
    "AsyPPO": Settings(critic_warmup=40),
}
CURVES = ["reward", "asyppo/explained_var", "asyppo/adv_abs_kept", "asyppo/adv_abs_masked"]


def new_weights(size: tuple[int, int], outputs: int, seed: int, *, tokens: int = V, length: int = P + T) -> dict:
    """Weights of one transformer of the given width and number of layers; the first axis of each is 1."""
    width, layers = size
    shapes = {"token": (tokens, width), "position": (length, width), "head": (width, outputs)}
    for i in range(layers):
        shapes |= {f"{i}.qkv": (width, 3 * width), f"{i}.out": (width, width)}
        shapes |= {f"{i}.up": (width, 4 * width), f"{i}.down": (4 * width, width)}
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return {name: torch.randn(1, *shape, generator=generator) / shape[0] ** 0.5 for name, shape in shapes.items()}


class Models:
    """S transformers of one shape, their weights stacked along a first axis, each with an Adam of its own."""

    def __init__(self, weights: Sequence[dict[str, Tensor]], lr_S: Sequence[float]) -> None:
        self.weights = {key: torch.cat([w[key].detach() for w in weights]).requires_grad_() for key in weights[0]}
        self.moments = [(torch.zeros_like(x), torch.zeros_like(x)) for x in self.weights.values()]
        self.lr_S, self.steps = torch.tensor(lr_S), 0

    def __call__(self, tokens_SBL: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        """Outputs at every position (S, B, L, outputs); with a cache, the tokens continue those that filled it."""
        w, (S, B, L) = self.weights, tokens_SBL.shape
        past, old, new = cache[0].shape[-2] if cache else 0, cache or [], []
        position_SND = w["position"][:, None, past : past + L].expand(-1, B, -1, -1).flatten(1, 2)
        x = w["token"].gather(1, tokens_SBL.flatten(1)[..., None].expand_as(position_SND)) + position_SND
        # Below, products of exactly three axes: with more, torch would copy the weights for every row.
        for i in range(sum(name.endswith("qkv") for name in w)):
            heads = (F.rms_norm(x, x.shape[-1:]) @ w[f"{i}.qkv"]).view(S * B, L, 3, -1, 16)
            q, k, v = heads.permute(2, 0, 3, 1, 4)
            if old:
                k, v = torch.cat([old[2 * i], k], 2), torch.cat([old[2 * i + 1], v], 2)
            new += [k, v]
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=not old)
            x = x + mixed.transpose(1, 2).reshape(x.shape) @ w[f"{i}.out"]
            x = x + F.gelu(F.rms_norm(x, x.shape[-1:]) @ w[f"{i}.up"]) @ w[f"{i}.down"]
        if cache is not None:
            cache[:] = new
        return (F.rms_norm(x, x.shape[-1:]) @ w["head"]).view(S, B, L, -1)

    def step(self, loss_S: Tensor) -> None:
        """One step of Adam on each model's own loss, its gradient clipped to norm 1."""
        self.steps += 1
        gradients = torch.autograd.grad(loss_S.sum(), list(self.weights.values()))
        norm_S11 = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)[:, None, None]
        rate_S11 = (self.lr_S / (1 - 0.9**self.steps))[:, None, None]
        for x, gradient, (first, second) in zip(self.weights.values(), gradients, self.moments, strict=True):
            first.lerp_(gradient / norm_S11.clamp_min(1), 0.1)
            second.lerp_((gradient / norm_S11.clamp_min(1)).square(), 0.001)
            x.data -= rate_S11 * first / ((second / (1 - 0.999**self.steps)).sqrt() + 1e-8)


def problems() -> tuple[Tensor, Tensor]:
    """The task is to spell three digits: all prompts (1000, P), "407=", and answers (1000, T), "four zero seven"."""
    prompts = [f"{number:03}=" for number in range(1000)]
    answers = [" ".join(WORDS[int(digit)] for digit in prompt[:3]).ljust(T, ALPHABET[END]) for prompt in prompts]
    asked, right = ([list(map(ALPHABET.index, text)) for text in texts] for texts in (prompts, answers))
    return torch.tensor(asked), torch.tensor(right)


def starting_actor(*, steps: int = 200) -> Models:
    """An actor that learned from answers with a typo in every twelfth letter, and now makes as many: reward 0.3."""
    actor, (prompts_NP, answers_NT) = Models([new_weights(ACTOR_SIZE, V, seed=0)], [0.0]), problems()
    for step in trange(steps, desc="supervised start"):
        actor.lr_S[0] = 2e-3 * min(1, step / 50, 2 * (1 - step / steps))
        drawn_B = torch.randint(len(prompts_NP), (128,))
        is_typo_BT = (torch.rand(128, T) < 1 / 12) & (answers_NT[drawn_B] != END)
        typed_BT = torch.where(is_typo_BT, torch.randint(ALPHABET.index("a"), V, (128, T)), answers_NT[drawn_B])
        logits_BTV = actor(torch.cat([prompts_NP[drawn_B], typed_BT], 1)[None])[0, :, P - 1 : -1]
        actor.step(F.cross_entropy(logits_BTV.flatten(0, 1), typed_BT.flatten())[None])
    return actor


def sample(actors: Callable[..., Tensor], prompts_RBP: Tensor, length: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """A response to every prompt: tokens (R, B, L), log-probabilities (R, B, T), and which of them count (R, B, T)."""
    tokens, log_probs = [prompts_RBP], []
    cache: list[Tensor] = []
    for _ in range(length):
        log_prob_RBV = actors(tokens[-1], cache)[:, :, -1].log_softmax(-1)
        tokens.append(log_prob_RBV.exp().flatten(0, 1).multinomial(1).view(*prompts_RBP.shape[:2], 1))
        log_probs.append(log_prob_RBV.gather(-1, tokens[-1]))
    is_end_RBT = (drawn_RBT := torch.cat(tokens[1:], -1)) == END
    is_response_RBT = is_end_RBT.cumsum(-1) - is_end_RBT.long() == 0  # the first end still counts
    tokens_RBL = torch.cat([prompts_RBP, torch.where(is_response_RBT, drawn_RBT, END)], -1)
    return tokens_RBL, torch.cat(log_probs, -1), is_response_RBT


def gae(rewards_BT: Tensor, values_BT: Tensor, is_response_BT: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """``A_t = sum_l lam^l (r_(t+l) + V_(t+l+1) - V_(t+l))``; returns A, whitened over all response tokens, and A + V."""
    values_BT = values_BT * is_response_BT
    delta_BT = rewards_BT + F.pad(values_BT, (0, 1))[:, 1:] - values_BT
    advantages = [torch.zeros_like(delta_BT[:, 0])]
    for delta_B in reversed(delta_BT.unbind(1)):
        advantages.append(delta_B + lam * advantages[-1])
    advantages_BT = torch.stack(advantages[:0:-1], 1)
    variance, mean = torch.var_mean(advantages_BT[is_response_BT])
    return (advantages_BT - mean) * (variance + 1e-8).rsqrt(), advantages_BT + values_BT


def credit(run: Settings, rewards_BT: Tensor, values_MBT: Tensor, is_response_BT: Tensor) -> tuple:
    """Advantages, critics' target, flags of tokens with a bonus, all (B, T); metrics. With one critic sigma is 0: PPO."""
    if run.num_critics == 0:  # GRPO: the reward, whitened over the responses to the same prompt
        rewards_GN = rewards_BT.sum(1).view(-1, run.responses)
        deviation_G1, mean_G1 = torch.std_mean(rewards_GN, 1, keepdim=True)
        advantages_B1 = ((rewards_GN - mean_G1) / (deviation_G1 + 1e-6)).view(-1, 1)
        return advantages_B1 * is_response_BT, rewards_BT, is_response_BT, {}
    value_BT, sigma_BT = asyppo.ensemble_value(values_MBT)
    advantages_BT, _ = gae(rewards_BT, value_BT, is_response_BT, run.lam)
    _, returns_BT = gae(rewards_BT, value_BT, is_response_BT, run.critic_lam)
    shares = {"adv_mask_fraction": run.adv_mask_fraction, "entropy_filter_fraction": run.entropy_filter_fraction}
    keep_adv_BT, keep_ent_BT = asyppo.select_tokens(sigma_BT, is_response_BT, **shares)
    values, selected = (value_BT, sigma_BT, returns_BT), (advantages_BT, sigma_BT, keep_adv_BT, keep_ent_BT)
    metrics = ensemble_metrics(values_MBT.flatten(1), *(x.flatten() for x in (*values, is_response_BT)))
    metrics |= selection_metrics(*(x.flatten() for x in (*selected, is_response_BT)))
    return asyppo.mask_advantage(advantages_BT, keep_adv_BT), returns_BT, keep_ent_BT, metrics


def actor_loss(log_prob: Tensor, bonus: Tensor, old: Tensor, advantages: Tensor, is_response: Tensor) -> Tensor:
    """Clipped policy loss less the entropy bonus, averaged over tokens, then responses; of (R, B, T), shape (R,)."""
    ratio = (log_prob - old).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * 3), loss) - bonus
    return ((loss * is_response).sum(-1) / is_response.sum(-1)).mean(-1)


def critic_loss(values: Tensor, old: Tensor, returns: Tensor, is_own: Tensor) -> Tensor:
    """Squared error, clipped around the critic's old values, over the tokens of its shard; of (S, B, T), shape (S,)."""
    clipped = torch.minimum(torch.maximum(values, old - 0.5), old + 0.5)
    loss = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (loss * is_own).sum((1, 2)) / is_own.sum((1, 2)).clamp_min(1)


def values_of(critics: Models, tokens_SBL: Tensor) -> Tensor:
    """Values (S, B, T) of the text before each response token."""
    return critics(tokens_SBL)[:, :, P - 1 : -1, 0]


def train(runs: Sequence[Settings], start: Models, *, steps: int, name: str = "") -> list[list[dict]]:
    """Train all runs at once, from the same start and each on its own draws; returns the metrics by step and run."""
    history, first, R, M = [], runs[0], len(runs), runs[0].num_critics
    B, (prompts_NP, answers_NT) = first.prompts * first.responses, problems()
    actors = Models([start.weights] * R, [run.actor_lr for run in runs])
    if M:
        weights = [new_weights(first.critic_size, 1, seed=1000 + s) for s in range(R * M)]
        critics = Models(weights, [run.critic_lr for run in runs for _ in range(M)])
        rows = [(str(row // first.responses), str(row)) for row in range(B)]
        owner_RB = torch.tensor([asyppo.assign_shards(rows, num_critics=M, shard=run.shard) for run in runs])
        is_own_SB1 = (owner_RB[:, None] == torch.arange(M)[:, None]).flatten(0, 1)[..., None]
    for step in trange(steps, desc=name):
        with torch.no_grad():
            drawn_RB = torch.randint(len(prompts_NP), (R, first.prompts)).repeat_interleave(first.responses, 1)
            tokens_RBL, old_RBT, is_response_RBT = sample(actors, prompts_NP[drawn_RB])
            tokens_SBL, is_response_SBT = (x.repeat_interleave(M, 0) for x in (tokens_RBL, is_response_RBT))
            values_SBT = values_of(critics, tokens_SBL) if M else old_RBT[:0]
        score_RB1 = (tokens_RBL[..., P:] == answers_NT[drawn_RB]).all(-1, keepdim=True).float()
        rewards_RBT = score_RB1 * F.one_hot(is_response_RBT.sum(-1) - 1, T)  # at the last token
        per_run = map(credit, runs, rewards_RBT, values_SBT.unflatten(0, (R, M)), is_response_RBT)
        *earned, metrics = zip(*per_run, strict=True)
        advantages_RBT, returns_RBT, keep_RBT = map(torch.stack, earned)
        history.append([{"reward": float(score_RB1[r].mean()), **metrics[r]} for r in range(R)])
        for part in first.epochs * torch.arange(B).chunk(first.mini_batches):
            if M:
                returns, is_own = returns_RBT[:, part].repeat_interleave(M, 0), is_own_SB1 & is_response_SBT
                values = values_of(critics, tokens_SBL[:, part])
                critics.step(critic_loss(values, values_SBT[:, part], returns, is_own[:, part]))
            if step >= first.critic_warmup:
                logs = actors(tokens_RBL[:, part])[:, :, P - 1 : -1].log_softmax(-1)
                log_prob = logs.gather(-1, tokens_RBL[:, part, P:, None])[..., 0]
                bonus = first.entropy_coeff * asyppo.filter_entropy(-(logs.exp() * logs).sum(-1), keep_RBT[:, part])
                batch = (x[:, part] for x in (old_RBT, advantages_RBT, is_response_RBT))
                actors.step(actor_loss(log_prob, bonus, *batch))
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--runs", type=int, default=2, help="runs of each algorithm, all at once")
    arguments = parser.parse_args()
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    start = starting_actor()
    figure, axes = plt.subplots(1, len(CURVES), figsize=(4 * len(CURVES), 3.5), layout="constrained")
    for name, settings in ALGORITHMS.items():
        history = train([settings] * arguments.runs, start, steps=arguments.steps, name=name)
        for axis, metric in zip(axes, CURVES, strict=True):
            axis.plot([sum(run.get(metric, math.nan) for run in step) / len(step) for step in history], label=name)
            axis.set(title=metric, ylim=(-0.2, 1.2))
    axes[0].legend()
    figure.savefig("one_page.png")


if __name__ == "__main__":
    main()

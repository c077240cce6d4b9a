"""Many runs of one task at once, by stacked weights, with every variant that the study compares.

The method is that of :mod:`recipe.asyppo.one_page`, whose models, losses and sampling are used; tests hold :func:`credit` to
its :func:`~recipe.asyppo.one_page.credit`. Shape suffixes as there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from asyppo_verl import asyppo
from recipe.asyppo import one_page
from recipe.asyppo.one_page import Models, Settings
from recipe.asyppo.study import tasks
from recipe.asyppo.study.tasks import Task


@dataclass(frozen=True)
class Run(Settings):
    """One run. Runs that train together share ``free_steps`` and ``prompts`` to ``entropy_coeff``, sorted by :func:`kind`."""

    seed: int = 0
    free_steps: int = 0  # steps of value pre-training before the run, not counted
    is_oracle: bool = False  # exact values instead of critics' (num_critics=0)
    mask_by: str = (
        "sigma"  # sigma, relative (to its mean at that position), highest, random, surprisal (of the drawn token)
    )
    mask_from: float | None = None  # explained variance of a step's values from which on its tokens are selected
    update_first: bool = False  # critics learn from a step's rewards before they value it; critic_lam is then 1
    prompts: int = 16
    responses: int = 8
    mini_batches: int = 4
    epochs: int = 2
    critic_epochs: int = 3
    entropy_coeff: float = 0.001
    critic_lr: float = 1e-3
    lam: float = 0.95
    critic_size: tuple[int, int] = (16, 1)


def gae(rewards_RBT: Tensor, values_RBT: Tensor, is_response_RBT: Tensor, lam_R: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`one_page.gae` of all runs: advantages, whitened within each run, and returns; both (R, B, T).

    As in verl, tokens that are no response (observations) are passed over.
    """
    advantage_RB = next_value_RB = torch.zeros_like(values_RBT[..., 0])
    advantages = []
    for t in reversed(range(values_RBT.shape[-1])):
        is_response_RB, value_RB = is_response_RBT[..., t], values_RBT[..., t]
        delta_RB = rewards_RBT[..., t] + next_value_RB - value_RB
        advantage_RB = torch.where(is_response_RB, delta_RB + lam_R[:, None] * advantage_RB, advantage_RB)
        next_value_RB = torch.where(is_response_RB, value_RB, next_value_RB)
        advantages.append(advantage_RB)
    advantages_RBT = torch.stack(advantages[::-1], -1)
    count_R11 = is_response_RBT.sum((1, 2), keepdim=True)
    mean_R11 = (advantages_RBT * is_response_RBT).sum((1, 2), keepdim=True) / count_R11
    squares_RBT = ((advantages_RBT - mean_R11) * is_response_RBT) ** 2
    variance_R11 = squares_RBT.sum((1, 2), keepdim=True) / (count_R11 - 1)
    return (advantages_RBT - mean_R11) * (variance_R11 + 1e-8).rsqrt(), advantages_RBT + values_RBT


def group_advantage(run: Settings, rewards_RBT: Tensor, is_response_RBT: Tensor) -> Tensor:
    """GRPO: the reward, whitened over the responses to the same prompt."""
    rewards_RGN = rewards_RBT.sum(-1).unflatten(1, (-1, run.responses))
    deviation_RG1, mean_RG1 = torch.std_mean(rewards_RGN, -1, keepdim=True)
    return ((rewards_RGN - mean_RG1) / (deviation_RG1 + 1e-6)).flatten(1, 2)[..., None] * is_response_RBT


def keep(score_RBT: Tensor, is_response_RBT: Tensor, fractions: Sequence[float], *, largest: bool) -> Tensor:
    """:func:`asyppo.keep_advantage` of all runs, or with ``largest`` :func:`asyppo.keep_entropy`; a share for each run."""
    outside = float("-inf") if largest else float("inf")
    score_RN = score_RBT.masked_fill(~is_response_RBT, outside).flatten(1)
    order_RN = score_RN.argsort(dim=1, descending=largest, stable=True)
    rank_RN = torch.empty_like(order_RN).scatter_(1, order_RN, torch.arange(order_RN.shape[1]).expand_as(order_RN))
    has_signal_R = ((score_RBT != 0) & is_response_RBT).any(2).any(1)
    fraction_R = torch.tensor(fractions, dtype=torch.float64)
    count_R = (fraction_R * is_response_RBT.sum((1, 2)) + 1e-6).floor() * has_signal_R
    return (rank_RN >= count_R[:, None]).view(score_RBT.shape)


def mask_score(runs: Sequence[Run], sigma_RBT: Tensor, surprisal_RBT: Tensor) -> Tensor:
    """What the advantage mask ranks, for every run: sigma, or what takes its place."""
    scores = {"sigma": sigma_RBT, "highest": -sigma_RBT, "surprisal": surprisal_RBT}
    scores["relative"] = sigma_RBT / sigma_RBT.mean(1, keepdim=True)
    scores["random"] = torch.rand_like(sigma_RBT)
    return torch.stack([scores[run.mask_by][row] for row, run in enumerate(runs)])


def credit(
    runs: Sequence[Run], rewards_RBT: Tensor, values_MRBT: Tensor, surprisal_RBT: Tensor, is_response_RBT: Tensor
) -> tuple[Tensor, Tensor, Tensor, dict[str, list[float]]]:
    """:func:`one_page.credit` of all runs; with no critics (M = 0) it is GRPO's. The metrics have a number for every run."""
    if len(values_MRBT) == 0:
        return group_advantage(runs[0], rewards_RBT, is_response_RBT), rewards_RBT, is_response_RBT, {}
    lam_R, critic_lam_R = (torch.tensor([getattr(run, name) for run in runs]) for name in ("lam", "critic_lam"))
    value_RBT, sigma_RBT = asyppo.ensemble_value(values_MRBT)
    advantages_RBT, _ = gae(rewards_RBT, value_RBT, is_response_RBT, lam_R)
    _, returns_RBT = gae(rewards_RBT, value_RBT, is_response_RBT, critic_lam_R)
    metrics = {"explained_var": explained_variance(value_RBT, rewards_RBT, is_response_RBT).tolist()}
    if len(values_MRBT) == 1:
        return advantages_RBT, returns_RBT, is_response_RBT, metrics
    selects = [
        run.mask_from is None or explained >= run.mask_from
        for run, explained in zip(runs, metrics["explained_var"], strict=True)
    ]
    k = [run.adv_mask_fraction * here for run, here in zip(runs, selects, strict=True)]
    h = [run.entropy_filter_fraction * here for run, here in zip(runs, selects, strict=True)]
    keep_adv_RBT = keep(mask_score(runs, sigma_RBT, surprisal_RBT), is_response_RBT, k, largest=False)
    keep_ent_RBT = keep(sigma_RBT, is_response_RBT, h, largest=True)
    size_RBT = advantages_RBT.abs() * is_response_RBT
    is_masked_RBT = is_response_RBT & ~keep_adv_RBT
    masked_R = (size_RBT * is_masked_RBT).sum((1, 2)) / is_masked_RBT.sum((1, 2)).clamp_min(1)
    kept_R = (size_RBT * keep_adv_RBT).sum((1, 2)) / (is_response_RBT & keep_adv_RBT).sum((1, 2))
    metrics |= {"masked_to_kept": (masked_R / kept_R).tolist()}
    return asyppo.mask_advantage(advantages_RBT, keep_adv_RBT), returns_RBT, keep_ent_RBT, metrics


def explained_variance(value_RBT: Tensor, rewards_RBT: Tensor, is_response_RBT: Tensor) -> Tensor:
    """``1 - Var[R - V] / Var[R]`` (R,) over response tokens, with the reward that the response got in the end as R."""
    return_RBT = rewards_RBT.sum(-1, keepdim=True).expand_as(value_RBT)

    def variance_R(x_RBT: Tensor) -> Tensor:
        count_R = is_response_RBT.sum((1, 2))
        mean_R11 = ((x_RBT * is_response_RBT).sum((1, 2)) / count_R)[:, None, None]
        return (((x_RBT - mean_R11) * is_response_RBT) ** 2).sum((1, 2)) / count_R

    return 1 - variance_R(return_RBT - value_RBT) / (variance_R(return_RBT) + 1e-5)


def owners(runs: Sequence[Run]) -> Tensor:
    """Which responses each critic trains on (M * R, B, 1); the critics of a run are R apart."""
    first, M = runs[0], runs[0].num_critics
    rows = [(str(row // first.responses), str(row)) for row in range(first.prompts * first.responses)]
    share = {
        "none": torch.ones(M, len(rows), dtype=torch.bool),  # all to all
        "half": (torch.arange(len(rows)) % 2 == 0).expand(M, -1),  # the same half of each group to all
    }
    for shard in ("group", "prompt"):
        share[shard] = torch.tensor(asyppo.assign_shards(rows, num_critics=M, shard=shard)) == torch.arange(M)[:, None]
    return torch.stack([share[run.shard] for run in runs], 1).flatten(0, 1)[..., None]


Start = Callable[[tuple[int, int]], Models]  # the model of a size that imitates the demonstrations


class Critics:
    """The critics of the consecutive runs that have them alike, and their share of a stack of runs.

    All start from the same small language model, each with a value head of its own.
    """

    def __init__(self, task: Task, runs: Sequence[Run], first: int, start: Start) -> None:
        self.task, self.runs, self.M = task, runs, runs[0].num_critics
        self.rows = slice(first, first + len(runs))
        self.is_oracle = runs[0].is_oracle
        if self.M:
            seeds = [1000 + 100 * run.seed + m for m in range(self.M) for run in runs]
            body = start(runs[0].critic_size).weights
            heads = [{"head": 0.1 * task.weights(runs[0].critic_size, 1, seed)["head"]} for seed in seeds]
            weights = [body | head for head in heads]
            self.models = Models(weights, [run.critic_lr for _ in range(self.M) for run in runs])
            self.is_own_SB1 = owners(runs)

    def values(self, tokens_RBL: Tensor) -> Tensor:
        """Values (M * R, B, T) of the text before each response token."""
        return self.models(tokens_RBL.repeat(self.M, 1, 1))[:, :, self.task.answers - 1 : -1, 0]

    def credit(self, tokens, old, is_response, is_right, rewards, chance) -> tuple:
        """Old values and what :func:`credit` gives, of these runs' rows of the stack."""
        if self.runs[0].update_first:
            self.old_values_SBT = self.values(tokens[self.rows])
            with torch.enable_grad():
                self.learn(tokens, is_response, rewards.sum(-1, keepdim=True).expand_as(rewards))
        tokens, old, is_response, is_right, rewards, chance = (
            x[self.rows] for x in (tokens, old, is_response, is_right, rewards, chance)
        )
        values_MRBT = old[None][:0]
        if self.is_oracle:
            values_MRBT = tasks.oracle_values(self.task, is_right, chance)[None]
        elif self.M:
            values_MRBT = self.values(tokens).unflatten(0, (self.M, len(self.runs)))
        self.old_values_SBT = values_MRBT.flatten(0, 1)
        *earned, metrics = credit(self.runs, rewards, values_MRBT, -old, is_response)
        return earned, metrics

    def learn(self, tokens: Tensor, is_response: Tensor, returns: Tensor) -> None:
        """Several passes over the responses of a step, of the whole stack; nothing without critics."""
        for _ in range(self.runs[0].critic_epochs if self.M else 0):
            for part in mini_batches(self.runs[0]):
                self.update(part, tokens, is_response, returns)

    def update(self, part: Tensor, tokens: Tensor, is_response: Tensor, returns: Tensor) -> None:
        """One optimizer step towards the returns, each critic on its own responses among ``part``."""
        tokens, is_response, returns = (x[self.rows, part] for x in (tokens, is_response, returns))
        is_own = self.is_own_SB1[:, part] & is_response.repeat(self.M, 1, 1)
        old, returns = self.old_values_SBT[:, part], returns.repeat(self.M, 1, 1)
        self.models.step(one_page.critic_loss(self.values(tokens), old, returns, is_own))


def kind(run: Run) -> tuple:
    """What runs must have in common for their critics to be stacked."""
    return run.free_steps, run.num_critics, run.critic_size, run.is_oracle, run.update_first


def mini_batches(run: Run) -> tuple[Tensor, ...]:
    """The responses of each mini-batch of one pass, in a new order."""
    return torch.randperm(run.prompts * run.responses).chunk(run.mini_batches)


class Trainer:
    """R runs of one task from the same start, each on draws of its own seed; :meth:`step` is one step of all."""

    def __init__(self, task: Task, runs: Sequence[Run], start: Start) -> None:
        self.task, self.runs, self.first, self.steps = task, runs, runs[0], 0
        self.actors = Models([start(task.actor_size).weights] * len(runs), [run.actor_lr for run in runs])
        self.lr_R, self.warmup_R = self.actors.lr_S, torch.tensor([run.critic_warmup for run in runs])
        self.generators = [torch.Generator("cpu").manual_seed(run.seed) for run in runs]
        groups = [list(group) for _, group in groupby(runs, kind)]
        firsts = accumulate(map(len, groups), initial=0)
        self.critics = [Critics(task, group, first, start) for group, first in zip(groups, firsts, strict=False)]

    def draw(self) -> Tensor:
        """Prompts of the step (R, B, P), every one repeated for its responses."""
        drawn = [self.task.draw_prompts(self.first.prompts, generator) for generator in self.generators]
        return torch.stack(drawn).to(self.lr_R.device).repeat_interleave(self.first.responses, 1)

    @torch.no_grad()
    def rollout(self) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        """The step's responses and what is to be learned from them, and the metrics of every run."""
        task = self.task
        tokens_RBL, old_RBT, is_response_RBT = tasks.sample(task, self.actors, self.draw())
        is_right_RBN, score_RB = task.grade(tokens_RBL)
        is_last_RBT = is_response_RBT & (is_response_RBT.flip(-1).cumsum(-1).flip(-1) == 1)
        rewards_RBT = score_RB[..., None] * is_last_RBT
        chance_RBN = is_right_RBN
        if any(run.is_oracle for run in self.runs):
            chance_RBN = tasks.chances(task, self.actors, tokens_RBL, self.first.responses)
        facts = (tokens_RBL, old_RBT, is_response_RBT, is_right_RBN, rewards_RBT, chance_RBN)
        per_group = [critics.credit(*facts) for critics in self.critics]
        advantages, returns, keep_entropy = map(torch.cat, zip(*(earned for earned, _ in per_group), strict=True))
        of_all = {"reward": score_RB.mean(1).tolist(), "admitted": task.admitted(tokens_RBL, is_right_RBN).tolist()}
        metrics = [
            {name: numbers[critics.rows][row] for name, numbers in of_all.items()}
            | {name: numbers[row] for name, numbers in group_metrics.items()}
            for (_, group_metrics), critics in zip(per_group, self.critics, strict=True)
            for row in range(len(critics.runs))
        ]
        batch = {"tokens": tokens_RBL, "is_response": is_response_RBT, "old": old_RBT, "returns": returns}
        return batch | {"advantages": advantages, "keep_entropy": keep_entropy}, metrics

    def step(self) -> list[dict[str, float]]:
        """Sample, give credit, train; returns the metrics of every run."""
        batch, metrics = self.rollout()
        self.actors.lr_S = torch.where(self.steps >= self.warmup_R, self.lr_R, 0)
        for critics in self.critics:
            if not critics.runs[0].update_first:
                critics.learn(*(batch[name] for name in ("tokens", "is_response", "returns")))
        for _ in range(self.first.epochs if self.steps >= 0 else 0):  # before the run only the critics learn
            for part in mini_batches(self.first):
                self.update_actors({name: x[:, part] for name, x in batch.items()})
        return metrics

    def update_actors(self, part: dict[str, Tensor]) -> None:
        """One optimizer step of every actor on some of a batch's responses."""
        start = self.task.answers
        logs = self.actors(part["tokens"])[:, :, start - 1 : -1].log_softmax(-1)
        log_prob = logs.gather(-1, part["tokens"][..., start:, None])[..., 0]
        entropy = -(logs.exp() * logs).sum(-1) if self.first.entropy_coeff else torch.zeros_like(log_prob)
        bonus = self.first.entropy_coeff * asyppo.filter_entropy(entropy, part["keep_entropy"])
        self.actors.step(one_page.actor_loss(log_prob, bonus, part["old"], part["advantages"], part["is_response"]))


def train(
    task: Task,
    runs: Sequence[Run],
    start: Start,
    *,
    steps: int,
    may_go_on: Callable[[], bool] = lambda: True,
    progress: Callable[[], object] = lambda: None,
) -> list[list[dict[str, float]]]:
    """Train all runs at once; returns the metrics by step and run, up to the step before which ``may_go_on`` said no."""
    torch.manual_seed(runs[0].seed)
    trainer, history = Trainer(task, runs, start), []
    for step in range(-runs[0].free_steps, steps):
        if not may_go_on():
            break
        trainer.steps = step
        metrics = trainer.step()
        if step >= 0:
            history.append(metrics)
            progress()
    return history

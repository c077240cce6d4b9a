"""Many runs of one task at once, by stacked weights.

The method is that of :mod:`recipe.asyppo.one_page`, whose models, losses and sampling are used; what tokens earn is in
:mod:`recipe.asyppo.study.credit`. Shape suffixes as there.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor

from asyppo_verl import asyppo
from asyppo_verl.adaptive_lam import AdaptiveLam
from recipe.asyppo import one_page
from recipe.asyppo.one_page import Models
from recipe.asyppo.study import tasks
from recipe.asyppo.study.credit import Run, credit
from recipe.asyppo.study.tasks import Task


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
            self.adaptive_lams = [AdaptiveLam(run.lam) for run in runs]

    def values(self, tokens_RBL: Tensor) -> Tensor:
        """Values (M * R, B, T) of the text before each response token."""
        return self.models(tokens_RBL.repeat(self.M, 1, 1))[:, :, self.task.answers - 1 : -1, 0]

    def credit(self, tokens, old, is_response, is_right, rewards, chance) -> tuple:
        """What :func:`credit` gives for these runs' rows of the stack; critics may learn from them before."""
        tokens, old, is_response, is_right, rewards, chance = (
            x[self.rows] for x in (tokens, old, is_response, is_right, rewards, chance)
        )

        def earned(values_MRBT: Tensor, *given: list[float] | None) -> tuple:
            return credit(self.runs, rewards, values_MRBT, -old, is_response, *given)

        if self.is_oracle:
            return earned(tasks.oracle_values(self.task, is_right, chance)[None])
        if not self.M:
            return earned(old[None][:0])
        of_each = (self.M, len(self.runs))
        self.old_values_SBT = self.values(tokens)
        values_MRBT = self.old_values_SBT.unflatten(0, of_each)
        first = earned(values_MRBT)
        if not (self.runs[0].update_first or self.runs[0].adaptive_lam):
            return first
        _, returns, _, metrics = first
        if self.runs[0].update_first:
            with torch.enable_grad():
                self.learn(tokens, is_response, returns)
            values_MRBT = self.values(tokens).unflatten(0, of_each)
        explained, lams = metrics["explained_var"], None
        if self.runs[0].adaptive_lam:
            lams = [lam(share) for lam, share in zip(self.adaptive_lams, explained, strict=True)]
        advantages, _, keep_entropy, metrics = earned(values_MRBT, lams, explained)
        return advantages, returns, keep_entropy, metrics

    def learn(self, tokens: Tensor, is_response: Tensor, returns: Tensor) -> None:
        """Several passes over these runs' responses of a step; nothing without critics."""
        for _ in range(self.runs[0].critic_epochs if self.M else 0):
            for part in mini_batches(self.runs[0]):
                self.update(tokens[:, part], is_response[:, part], returns[:, part], part)

    def update(self, tokens: Tensor, is_response: Tensor, returns: Tensor, part: Tensor) -> None:
        """One optimizer step towards the returns, each critic on its own responses among ``part`` of the step's."""
        is_own = self.is_own_SB1[:, part] & is_response.repeat(self.M, 1, 1)
        old, returns = self.old_values_SBT[:, part], returns.repeat(self.M, 1, 1)
        self.models.step(one_page.critic_loss(self.values(tokens), old, returns, is_own))


def kind(run: Run) -> tuple:
    """What runs must have in common for their critics to be stacked."""
    return run.free_steps, run.num_critics, run.critic_size, run.is_oracle, run.update_first, run.adaptive_lam


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
        advantages, returns, keep_entropy, of_groups = zip(*per_group, strict=True)
        of_all = {"reward": score_RB.mean(1).tolist(), "admitted": task.admitted(tokens_RBL, is_right_RBN).tolist()}
        metrics = [
            {name: numbers[critics.rows][row] for name, numbers in of_all.items()}
            | {name: numbers[row] for name, numbers in group_metrics.items()}
            for group_metrics, critics in zip(of_groups, self.critics, strict=True)
            for row in range(len(critics.runs))
        ]
        batch = {"tokens": tokens_RBL, "is_response": is_response_RBT, "old": old_RBT}
        earned = {"advantages": advantages, "returns": returns, "keep_entropy": keep_entropy}
        return batch | {name: torch.cat(parts) for name, parts in earned.items()}, metrics

    def step(self) -> list[dict[str, float]]:
        """Sample, give credit, train; returns the metrics of every run."""
        batch, metrics = self.rollout()
        self.actors.lr_S = torch.where(self.steps >= self.warmup_R, self.lr_R, 0)
        for critics in self.critics:
            if not critics.runs[0].update_first:
                critics.learn(*(batch[name][critics.rows] for name in ("tokens", "is_response", "returns")))
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

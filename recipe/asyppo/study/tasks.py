"""The study's tasks: answer every symbol of a prompt with its digit. What a critic can see of it differs.

A prompt is n symbols, each drawn from a thousand or two; the response answers them one after the other with one of ten digits.
Every symbol has one right digit. The actor starts from demonstrations that give it with a probability of the symbol's own, and
one certain wrong digit otherwise: a thousand habits to correct, one by one, from a grade that comes after the last token.

Remarks, right or wrong, tell a critic of every error without its knowing a single answer:

* ``observed``: the environment writes a true one after every answer, as a tool or a test would; it is not trained.
* ``own``: the model writes it, as one that doubts its own step. The demonstrations' remarks are true; training may change that.
* ``none``: a critic that knows no answers sees how hard the prompt's symbols are, and nothing of the errors.

Shape suffixes as in :mod:`recipe.asyppo.one_page`; N answers in a response, K symbols.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from recipe.asyppo import one_page
from recipe.asyppo.one_page import Models

WRONG, RIGHT, DIGITS, FIRST_SYMBOL = 1, 2, 3, 13  # tokens: two remarks, ten digits, then the symbols


@dataclass(frozen=True)
class Task:
    """A family of prompts, how a response is graded, and what the start knows."""

    name: str
    symbols: int = 2048  # K
    answers: int = 16  # N: symbols in a prompt
    remarks: str = "none"  # after every answer: none, own or observed
    is_exact: bool = False  # reward: all answers right, or else their share
    chance: tuple[float, float] = (0.15, 0.6)  # probability of the right digit: hard symbols, easy symbols
    hard: float = 0.5  # share of hard symbols
    actor_size: tuple[int, int] = (32, 2)
    actor_lrs: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    supervised_steps: int = 400
    demonstrations: int = 512  # in each of these steps
    table_seed: int = 0  # of the table, the demonstrations and the start

    @property
    def vocabulary(self) -> int:
        return FIRST_SYMBOL + self.symbols

    @property
    def stride(self) -> int:
        """Tokens per answer."""
        return 1 if self.remarks == "none" else 2

    @property
    def response_length(self) -> int:
        return self.answers * self.stride

    def is_trained(self) -> Tensor:
        """Which response tokens (T,) the model writes itself."""
        return (torch.arange(self.response_length) % self.stride == 0) | (self.remarks == "own")

    def weights(self, size: tuple[int, int], outputs: int, seed: int) -> dict[str, Tensor]:
        """New weights of a model that reads a prompt and its response."""
        length = self.answers + self.response_length
        return one_page.new_weights(size, outputs, seed, tokens=self.vocabulary, length=length)

    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every symbol (K,): the right token, the habitual wrong one, and the start's probability of the right one."""
        return _table(self, torch.get_default_device())

    def draw_prompts(self, count: int, generator: torch.Generator) -> Tensor:
        """Prompts (count, N), drawn and left on the CPU, so that every device sees the same."""
        shape = (count, self.answers)
        return torch.randint(self.symbols, shape, generator=generator, device="cpu") + FIRST_SYMBOL

    def demonstrate(self, prompts_BN: Tensor) -> Tensor:
        """Responses (B, T) as the start gives them: right with each symbol's chance, remarks always true."""
        right_K, wrong_K, chance_K = self.table()
        symbols_BN = prompts_BN - FIRST_SYMBOL
        is_right_BN = torch.rand(symbols_BN.shape) < chance_K[symbols_BN]
        answers_BN = torch.where(is_right_BN, right_K[symbols_BN], wrong_K[symbols_BN])
        remarks_BN = torch.where(is_right_BN, RIGHT, WRONG)
        return torch.stack([answers_BN, remarks_BN][: self.stride], -1).flatten(-2)

    def right_tokens(self, tokens_RBL: Tensor) -> Tensor:
        """The right digits (R, B, N) of the prompts in ``tokens_RBL``."""
        return self.table()[0][tokens_RBL[..., : self.answers] - FIRST_SYMBOL]

    def grade(self, tokens_RBL: Tensor) -> tuple[Tensor, Tensor]:
        """Which answers are right (R, B, N), and the reward of the response (R, B). Answers after an early end are wrong."""
        is_right_RBN = tokens_RBL[..., self.answers :: self.stride] == self.right_tokens(tokens_RBL)
        return is_right_RBN, is_right_RBN.all(-1).float() if self.is_exact else is_right_RBN.float().mean(-1)

    def admitted(self, tokens_RBL: Tensor, is_right_RBN: Tensor) -> Tensor:
        """Share of the wrong answers whose remark says so (R,): what the text shows of the errors. 0 without remarks."""
        remarks_RBN = tokens_RBL[..., self.answers + 1 :: self.stride]
        if self.remarks == "none":
            return torch.zeros(len(tokens_RBL))
        is_admitted_RBN = ~is_right_RBN & (remarks_RBN == WRONG)
        return is_admitted_RBN.sum((1, 2)) / (~is_right_RBN).sum((1, 2)).clamp_min(1)


@cache
def _table(task: Task, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(task.table_seed)
        right_K = torch.randint(10, (task.symbols,), generator=generator)
        wrong_K = (right_K + torch.randint(1, 10, (task.symbols,), generator=generator)) % 10
        chance_K = torch.where(torch.rand(task.symbols, generator=generator) < task.hard, *task.chance)
    return (right_K + DIGITS).to(device), (wrong_K + DIGITS).to(device), chance_K.to(device)


def oracle_values(task: Task, is_right_RBN: Tensor, chance_RBN: Tensor) -> Tensor:
    """Exact values (R, B, T) of the text before each response token, whatever was written of answers and remarks.

    ``V = (right answers so far + sum of the chances of those to come) / N``, or, graded as a whole,
    ``V = [none wrong so far] * product of the chances of those to come``.

    Args:
        is_right_RBN: which answers are right.
        chance_RBN: the policy's probability of the right digit at every answer.
    """
    if task.is_exact:
        alive_RBN = F.pad(is_right_RBN.float().cumprod(-1), (1, 0), value=1.0)
        to_come_RBN = F.pad(chance_RBN.flip(-1).cumprod(-1).flip(-1), (0, 1), value=1.0)
        value_RBN = alive_RBN * to_come_RBN
    else:
        so_far_RBN = F.pad(is_right_RBN.float().cumsum(-1), (1, 0))
        to_come_RBN = F.pad(chance_RBN.flip(-1).cumsum(-1).flip(-1), (0, 1))
        value_RBN = (so_far_RBN + to_come_RBN) / task.answers
    if task.remarks == "none":
        return value_RBN[..., :-1]
    # Before answer i: i answers are known; before its remark: i + 1.
    return torch.stack([value_RBN[..., :-1], value_RBN[..., 1:]], -1).flatten(-2)


class Environment:
    """The actors of a task, to sample from: where the environment writes, whatever they say, it is the true remark."""

    def __init__(self, task: Task, actors: Models, prompts_RBP: Tensor) -> None:
        self.actors, self.position, self.is_trained_T = actors, 0, task.is_trained()
        self.right_RBT = task.right_tokens(prompts_RBP).repeat_interleave(task.stride, -1)

    def __call__(self, tokens_RBL: Tensor, cache: list[Tensor]) -> Tensor:
        """Logits (R, B, L, V) after the tokens that continue those of the cache."""
        logits_RBLV, t = self.actors(tokens_RBL, cache), self.position
        self.position += 1
        if self.is_trained_T[t]:
            return logits_RBLV
        remark_RB1 = torch.where(tokens_RBL[..., -1:] == self.right_RBT[..., t, None], RIGHT, WRONG)
        return torch.full_like(logits_RBLV, float("-inf")).scatter_(-1, remark_RB1[..., None], 0.0)


def sample(task: Task, actors: Models, prompts_RBP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`one_page.sample`, in the task's environment; what that wrote does not count as response."""
    tokens_RBL, log_prob_RBT, is_response_RBT = one_page.sample(
        Environment(task, actors, prompts_RBP), prompts_RBP, task.response_length
    )
    return tokens_RBL, log_prob_RBT, is_response_RBT & task.is_trained()


def chances(task: Task, actors: Models, tokens_RBL: Tensor, responses: int) -> Tensor:
    """The actors' probability of the right digit at every answer (R, B, N), averaged over the responses to a prompt."""
    probability_RBTV = actors(tokens_RBL)[:, :, task.answers - 1 : -1].softmax(-1)[:, :, :: task.stride]
    chance_RBN = probability_RBTV.gather(-1, task.right_tokens(tokens_RBL)[..., None])[..., 0]
    groups = chance_RBN.unflatten(1, (-1, responses))
    return groups.mean(2, keepdim=True).expand_as(groups).flatten(1, 2)


def starting_model(task: Task, size: tuple[int, int]) -> Models:
    """A language model that imitates the demonstrations, errors included: the actor's start, and the critics' bodies."""
    torch.manual_seed(task.table_seed)
    actor = Models([task.weights(size, FIRST_SYMBOL, task.table_seed)], [0.0])  # symbols are read, never written
    generator = torch.Generator("cpu").manual_seed(task.table_seed)
    for step in range(task.supervised_steps):
        actor.lr_S[0] = 3e-3 * min(1, step / 50, 2 * (1 - step / task.supervised_steps))
        prompts_BN = task.draw_prompts(task.demonstrations, generator).to(actor.lr_S.device)
        response_BT = task.demonstrate(prompts_BN)
        logits_BTV = actor(torch.cat([prompts_BN, response_BT], 1)[None])[0, :, task.answers - 1 : -1]
        actor.step(F.cross_entropy(logits_BTV.flatten(0, 1), response_BT.flatten())[None])
    return actor


TASKS = {
    task.name: task
    for task in (
        Task("tool", remarks="observed"),
        Task("plain"),
        Task("own", remarks="own"),
        Task(
            "exact",
            remarks="observed",
            answers=8,
            is_exact=True,
            chance=(0.3, 0.95),
            hard=0.2,
            actor_lrs=(2.5e-4, 5e-4, 1e-3, 2e-3),
        ),
        Task("long", remarks="observed", answers=32),
    )
}


def named(name: str) -> Task:
    """The task of a name such as ``tool``, or ``tool@200``, which is ``tool`` with a table and a start of its own."""
    base, _, table_seed = name.partition("@")
    return replace(TASKS[base], name=name, table_seed=int(table_seed or 0))

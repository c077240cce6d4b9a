"""Healthy ranges of the metrics, the one source of docs/metrics.md and of a report's verdict.

``python -m recipe.asyppo.report.ranges`` prints the table of docs/metrics.md.
"""

import dataclasses

START = "its start"
"""Reference of a limit: the mean over the first quarter of the steps."""

Limit = float | tuple[float, str]
"""A number, or a factor and what it multiplies: :data:`START`, a metric (with "/") or a setting (with ".")."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A row of the table. ``<m>`` in the key stands for the number of a mini-critic."""

    key: str
    meaning: str
    low: Limit | None = None
    high: Limit | None = None
    note: str = ""
    """Said of the range where limits do not say it all."""
    advice: str = ""
    """What to try outside the range."""
    of_several: bool = False
    """Says something only of two critics or more."""

    @property
    def healthy(self) -> str:
        """The range in words."""
        if self.low is not None and self.high is not None:
            words = f"{_words(self.low)} to {_words(self.high)}"
        elif self.low is not None:
            words = "above 0" if self.low == 0 else f"at least {_words(self.low)}"
        else:
            words = "" if self.high is None else "0" if self.high == 0 else f"at most {_words(self.high)}"
        return "; ".join(part for part in (words, self.note) if part)


def _words(limit: Limit) -> str:
    if not isinstance(limit, tuple):
        return f"{limit:g}"
    factor, name = limit
    name = name if name == START else f"`{name}`"
    return name if factor == 1 else f"{factor:g} x {name}"


LEARN_MORE = (
    "train the critics longer before the actor (trainer.critic_warmup), more often on the same responses "
    "(critic.ppo_epochs=4), with a higher critic.optim.lr, or take a larger critic"
)
DIFFER = "the critics are equal: give each its own head (asyppo.head_seed) and shard (asyppo.shard=group)"

METRICS = [
    Metric(
        "asyppo/critic_<m>/vf_loss",
        "value loss of mini-critic m on its shard",
        high=(2, START),
        note="falls, then level",
        advice="lower critic.optim.lr, or set critic.optim.clip_grad",
    ),
    Metric(
        "asyppo/critic_<m>/vf_clipfrac",
        "share of its tokens on which value clipping acted",
        high=0.2,
        advice="raise critic.cliprange_value, or lower critic.optim.lr or critic.ppo_epochs",
    ),
    Metric(
        "asyppo/critic_<m>/grad_norm",
        "gradient norm before clipping",
        high=(10, "critic.optim.clip_grad"),
        advice="a longer learning rate warm-up (critic.optim.lr_warmup_steps) or a lower critic.optim.lr",
    ),
    Metric("asyppo/critic_<m>/lr", "learning rate", note="as configured"),
    Metric(
        "asyppo/critic_<m>/skipped_updates",
        "its updates of this step that verl skipped because the gradient was not finite",
        high=0,
        note="three steps in a row with none finite stop the run (fp16: nineteen, while torch finds a loss scale)",
        advice="lower critic.optim.lr or raise critic.optim.lr_warmup_steps",
    ),
    Metric(
        "asyppo/critic_<m>/explained_var",
        "1 - Var[return - value] / Var[return] over the whole batch (all shards), before it trains on it",
        low=0,
        note="rises; at or below 0 after thirty steps critics explain nothing",
        advice=LEARN_MORE,
    ),
    Metric("asyppo/critic_<m>/responses", "responses it trains on in this step", note="about 1/M of the batch"),
    Metric(
        "asyppo/explained_var",
        "explained_var of the mean",
        low=0,
        note="at least the average of the single critics",
        advice=LEARN_MORE,
    ),
    Metric(
        "asyppo/lam",
        "lambda of the advantages",
        note="`algorithm.lam`; with `asyppo.adaptive_lam` it falls to 0 as `asyppo/explained_var` rises from 0.1 to 0.3",
    ),
    Metric(
        "asyppo/sigma/mean",
        "mean over response tokens of the standard deviation across critics",
        low=0,
        note="falls as the critics learn",
        advice=DIFFER,
        of_several=True,
    ),
    Metric("asyppo/sigma/p10", "its 10 % quantile", low=0, advice=DIFFER, of_several=True),
    Metric("asyppo/sigma/p50", "its median", low=0, advice=DIFFER, of_several=True),
    Metric(
        "asyppo/sigma/p90",
        "its 90 % quantile",
        high=(10, "asyppo/sigma/p50"),
        advice="a few tokens carry the disagreement; look at them in the token view (asyppo.inspect.every)",
        of_several=True,
    ),
    Metric(
        "asyppo/sigma/p99",
        "its 99 % quantile",
        high=(30, "asyppo/sigma/p50"),
        note="a jump means that a critic diverges",
        advice="lower critic.optim.lr or critic.optim.clip_grad",
        of_several=True,
    ),
    Metric(
        "asyppo/sigma/tied",
        "share of masked tokens picked among ties, by row order",
        high=0.1,
        note="more means that values are too coarse, or critics too equal",
        advice="let the critics differ: other heads (asyppo.head_seed) or models (asyppo.critic_overrides.<m>.model.path)",
        of_several=True,
    ),
    Metric(
        "asyppo/critic_correlation",
        "mean correlation between the critics' values",
        low=0,
        high=0.99,
        note="rises; 1 means that the ensemble is worth one critic",
        advice="below: the critics have not learned yet, see explained variance; above: smaller shards or other heads, "
        "asyppo.shard=group",
        of_several=True,
    ),
    Metric(
        "asyppo/adv_masked_fraction",
        "share of response tokens whose advantage was masked",
        low=(0.9, "asyppo.adv_mask_fraction"),
        high=(1, "asyppo.adv_mask_fraction"),
        note="0 if the critics are equal",
        advice=DIFFER,
        of_several=True,
    ),
    Metric(
        "asyppo/entropy_filtered_fraction",
        "share that the entropy filter drops",
        low=(0.9, "asyppo.entropy_filter_fraction"),
        high=(1, "asyppo.entropy_filter_fraction"),
        note="0 if the critics are equal",
        advice=DIFFER,
        of_several=True,
    ),
    Metric(
        "asyppo/adv_abs_kept",
        "mean absolute advantage of the tokens that were kept",
        low=0.4,
        high=1.2,
        note="0.8 to 1 where half of the responses are right (advantages are whitened)",
        advice="nearly all responses have the same reward: take problems that the actor solves in part",
    ),
    Metric(
        "asyppo/adv_abs_masked",
        "the same for those that were masked, before masking",
        high=(1, "asyppo/adv_abs_kept"),
        note="lower when sigma finds the uninformative tokens",
        advice="sigma is noise until the critics explain the returns: a longer trainer.critic_warmup, or a smaller "
        "asyppo.adv_mask_fraction",
        of_several=True,
    ),
    Metric(
        "asyppo/mask/adv_ratio",
        "mean absolute advantage of the masked tokens over that of all; a mask drawn at random has 1",
        high=0.95,
        note="lower when sigma finds the uninformative tokens",
        advice="the masks do no better than chance: train the critics longer before the actor (trainer.critic_warmup), on all "
        "responses (asyppo.shard=none), or set asyppo.adv_mask_fraction=0",
        of_several=True,
    ),
    Metric(
        "asyppo/mask/return_correlation",
        "correlation of being masked with the return; a mask drawn at random has 0",
        low=-0.2,
        high=0.2,
        note="far from 0 the masks choose responses, not tokens",
        advice="the critics agree on what is right, or on what is wrong: lower asyppo.adv_mask_fraction",
        of_several=True,
    ),
    Metric(
        "asyppo/incomplete_groups",
        "prompts with some but fewer than `rollout.n` sessions",
        high=0,
        advice="rollouts fail: the log says why",
    ),
    Metric(
        "critic/score/mean", "reward of a response (verl)", low=(1, START), advice="see the other rows of this table"
    ),
    Metric(
        "actor/entropy",
        "entropy of the actor (verl)",
        low=(0.2, START),
        note="a fall to 0 is a collapse",
        advice="raise actor_rollout_ref.actor.entropy_coeff, lower asyppo.entropy_filter_fraction or the actor's optim.lr",
    ),
    Metric(
        "actor/ppo_kl",
        "KL between old and current policy (verl)",
        low=-0.05,
        high=0.05,
        advice="lower the actor's optim.lr or ppo_epochs",
    ),
    Metric(
        "actor/pg_clipfrac",
        "share of tokens whose policy ratio was clipped (verl)",
        high=0.2,
        advice="lower the actor's optim.lr or ppo_epochs, or raise its clip_ratio",
    ),
    Metric(
        "actor/grad_norm",
        "gradient norm of the actor before clipping (verl)",
        high=(10, "actor_rollout_ref.actor.optim.clip_grad"),
        advice="lower the actor's optim.lr, or give it a warm-up",
    ),
    Metric(
        "response_length/clip_ratio",
        "share of responses that reached the longest length (verl)",
        high=0.3,
        advice="raise data.max_response_length",
    ),
]


def table() -> str:
    """The table of docs/metrics.md."""
    rows = [f"| `{metric.key}` | {metric.meaning} | {metric.healthy or '-'} |" for metric in METRICS]
    return "\n".join(["| key | meaning | healthy range |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())

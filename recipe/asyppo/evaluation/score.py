"""Statistics of sampled answers: avg@k, pass@k, maj@k and bootstrap intervals. Pure numpy, no files.

Shapes: P problems of one benchmark, D bootstrap draws, K columns (one a metric).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, with the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float


def powers(samples: int) -> list[int]:
    """The k at which pass@k is reported: 1, 2, 4, ... and ``samples`` itself."""
    return [*(2**i for i in range(samples.bit_length()) if 2**i < samples), samples]


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is right (Chen et al. 2021, 2107.03374).

    1 - C(n - c, k) / C(n, k) for c right among n samples: the share of the k-subsets with a right one.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@k needs 1 <= k <= samples: k={k}, samples={samples}")
    return 1 - comb(samples - correct, k) / comb(samples, k)


def normalise(answer: object) -> str | None:
    """An answer as it votes: no white space, no enclosing dollar signs, no full stop at the end.

    None, or nothing left: the sample gives no answer.
    """
    return "".join(str(answer).split()).strip("$").rstrip(".") or None if answer is not None else None


def majority(answers: Sequence[object], is_correct: Sequence[bool]) -> float:
    """Probability that the most frequent answer is right (maj@n, Wang et al. 2022, 2203.11171).

    Samples without an answer do not vote; ties are broken at random, so the result is the mean over the tied answers; no
    vote at all is wrong. A group of equal answers counts as right in the share in which its samples do.
    """
    votes = defaultdict(list)
    for answer, correct in zip(map(normalise, answers), is_correct, strict=True):
        if answer is not None:
            votes[answer].append(correct)
    most = max(map(len, votes.values()), default=0)
    return float(np.mean([np.mean(group) for group in votes.values() if len(group) == most])) if votes else 0.0


def bootstrap(values_PK: ArrayLike, *, seed: Sequence[int], draws: int = DRAWS) -> NDArray[np.float64]:
    """Column means of ``draws`` resamples of the problems, drawn with replacement; (D, K).

    All columns of a draw see the same problems, so differences between columns are paired.
    """
    values_PK = np.asarray(values_PK, dtype=np.float64)
    count = len(values_PK)
    times_DP = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    return times_DP @ values_PK / count


def _estimates(names: Sequence[str], means_K: NDArray, means_DK: NDArray) -> dict[str, Estimate]:
    """Percentile intervals that hold :data:`LEVEL` of the draws."""
    low_K, high_K = np.quantile(means_DK, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    columns = zip(means_K.tolist(), low_K.tolist(), high_K.tolist(), strict=True)
    return {name: Estimate(*column) for name, column in zip(names, columns, strict=True)}


def estimate(
    benchmarks: Mapping[str, Mapping[str, ArrayLike]], *, seed: int = 0, draws: int = DRAWS
) -> tuple[dict[str, dict[str, Estimate]], dict[str, Estimate]]:
    """Mean and interval of every metric of every benchmark, and of the unweighted average over the benchmarks.

    ``benchmarks[name][metric]`` holds one value a problem. Benchmarks are resampled independently of each other; the
    average has only the metrics that all of them have. A difference between two models is just another metric.
    """
    if not benchmarks:
        raise ValueError("nothing to estimate: no benchmark has a sample")
    shared = [m for m in next(iter(benchmarks.values())) if all(m in metrics for metrics in benchmarks.values())]
    table, means, resampled = {}, [], []
    for index, (name, metrics) in enumerate(benchmarks.items()):
        values_PK = np.array(list(metrics.values()), dtype=np.float64).T
        means_K, means_DK = values_PK.mean(axis=0), bootstrap(values_PK, seed=(seed, index), draws=draws)
        table[name] = _estimates(list(metrics), means_K, means_DK)
        columns = [list(metrics).index(metric) for metric in shared]
        means.append(means_K[columns])
        resampled.append(means_DK[:, columns])
    return table, _estimates(shared, np.mean(means, axis=0), np.mean(resampled, axis=0))

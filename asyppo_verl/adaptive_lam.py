"""Lambda of the advantages by what the critics know, for ``asyppo.adaptive_lam`` (ours; docs/study.md)."""

SOME, ENOUGH = 0.1, 0.3
"""Explained variance of the values up to which lambda stays what it is, and from which on it is 0."""

MEMORY = 0.7
"""Weight of the steps before this one in the running mean of the explained variance."""

WORST = -1.0
"""Explained variance that lower ones count as: a step of nearly equal returns can be thousands below 0."""


class AdaptiveLam:
    """``lam * clip((ENOUGH - explained) / (ENOUGH - SOME), 0, 1)``, by the running mean of the explained variance.

    Critics that explain nothing leave ``lam`` as it is: every token of a response shares its reward. As they learn, a token
    answers less and less for what follows it.
    """

    def __init__(self, lam: float) -> None:
        self.lam = lam
        self._mean: float | None = None

    def __call__(self, explained: float) -> float:
        """Lambda of the step whose values, before the critics' update, explain that share of the returns' variance."""
        explained = max(explained, WORST)
        self._mean = explained if self._mean is None else MEMORY * self._mean + (1 - MEMORY) * explained
        return self.lam * min(1.0, max(0.0, (ENOUGH - self._mean) / (ENOUGH - SOME)))

"""Reward of the toy tasks: 1 for exactly the right answer, else 0."""


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **_: object
) -> dict[str, float | str]:
    """Score one response, in verl's custom reward interface; ``pred`` is what verl's majority votes count."""
    answer = solution_str.strip()
    score = float(answer == ground_truth)
    return {"score": score, "acc": score, "pred": answer}

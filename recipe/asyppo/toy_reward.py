"""Reward of the toy task, in the form of verl's ``reward.custom_reward_function``."""


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """1 for exactly the right sum, else 0."""
    return float(solution_str.strip() == ground_truth)

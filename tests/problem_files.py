"""Small problem sets in the schemas of the hub, and how a test writes them as files."""

import json
from pathlib import Path

import pandas as pd

STEPS = "The sum of the first $n$ odd numbers is $n^2$, so"
HUB = {
    # As on the hub: one row or more a set, with the fields there.
    "deepmath": [
        {"question": f"Find the limit of $a_{{n}} = {k} + 1/n$ as n grows.", "final_answer": str(k), "difficulty": 5.0}
        for k in range(40)
    ],
    "math": [{"problem": "What is $3/6$ in lowest terms?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "level": "Level 1"}],
    "gsm8k": [{"question": "Tom has 1,000 nuts. He buys 234. How many now?", "answer": "1000+234=1234.\n#### 1,234"}],
    "aime24": [{"id": 60, "problem": "Find $n$ for the odd sum 81.", "solution": rf"{STEPS} \boxed{{8}}, no, \boxed{{009}}."}],
    "aime25": [{"id": "0", "problem": "Find the sum of the bases $b>9$.", "answer": "70"}],
    "math500": [{"problem": "Convert $(0,3)$ to polar form.", "answer": r"\left( 3, \frac{\pi}{2} \right)"}],
    "olympiadbench": [
        {"question": "Solve in pairs.", "final_answer": ["$69$,$84$"], "unit": None, "is_multiple_answer": True},
        {"question": "How long does it take?", "final_answer": ["45"], "unit": "minute", "is_multiple_answer": False},
    ],
    "minerva": [{"question": "Compute the luminosity.", "answer": "4.5e33"}],
    "amc23": [{"id": 0, "question": "How many miles from A do they meet?", "answer": 27.0, "url": "https://example.org"}],
}  # fmt: skip


def write_sets(folder: Path, sets: dict[str, list[dict]], ending: str = "jsonl") -> None:
    """One file a set; the ending says how."""
    folder.mkdir(exist_ok=True)
    for name, rows in sets.items():
        if ending == "jsonl":
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif ending == "json":
            (folder / f"{name}.json").write_text(json.dumps(rows))
        elif ending == "parquet":
            pd.DataFrame(rows).to_parquet(folder / f"{name}.parquet")
        else:
            pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)

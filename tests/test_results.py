"""From verl's dump of sampled answers to the table: figures worked out by hand, and dumps that are refused."""

import json

import pytest

from recipe.asyppo.evaluation import results
from recipe.asyppo.evaluation.labelled_reward import problem_id


def dumped(uid: str, session: int, problem: str, score: float, **reward: object) -> str:
    label = {"benchmark": "sums", "problem": problem, "tokens": 3, "truncated": False, "reward": reward}
    row = {"input": "1+1=", "output": "2", "gts": "2", "score": score, "step": 0, "uid": f"{uid}_{session}_0"}
    return json.dumps({**row, "label": json.dumps(label)}) + "\n"


def test_a_dump_becomes_the_table_worked_out_by_hand(tmp_path):
    """Two problems of four samples: three right with the majority, one right against the majority."""
    rows = [
        dumped("u-1", i, "p", s, acc=s, pred=a) for i, (s, a) in enumerate([(1, "2"), (1, "2"), (1, "2"), (0, "3")])
    ]
    rows += [
        dumped("u-2", i, "q", s, acc=s, pred=a) for i, (s, a) in enumerate([(1, "5"), (0, "6"), (0, "6"), (0, "")])
    ]
    (tmp_path / "0.jsonl").write_text("".join(rows))
    samples = results.read_dump(tmp_path / "0.jsonl")
    results.check_complete(samples, problems=2, k=4, log=tmp_path / "log")
    table = results.evaluate(samples)
    found = {name: entry["value"] for name, entry in table["benchmarks"]["sums"].items() if "@" in name}
    # pass@2: 1 and 1 - 3/6.
    assert found == pytest.approx({"avg@4": 0.5, "pass@1": 0.5, "pass@2": 0.75, "pass@4": 1.0, "maj@4": 0.5})
    assert table["problems"] == {"sums": {"p": [3, 4], "q": [1, 4]}}
    assert table["average"] == {name: table["benchmarks"]["sums"][name] for name in table["average"]}
    shown = results.markdown({"target": "a model", "settings": {"k": "4"}, **table})
    assert "| sums | 2 | 50.0 [25.0, 75.0] | 75.0 [50.0, 100.0] | 100.0 [100.0, 100.0] | 50.0" in shown


def test_a_response_may_hold_any_character(tmp_path):
    """verl writes JSON with Unicode as it is, line separators included."""
    row = json.loads(dumped("u", 0, "p", 1.0)) | {"output": "a\u2028b\x85c\x0cd\r\ne"}
    (tmp_path / "0.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (sample,) = results.read_dump(tmp_path / "0.jsonl")
    assert sample["response"] == row["output"]


def test_without_an_extracted_answer_there_is_no_vote(tmp_path):
    (tmp_path / "0.jsonl").write_text("".join(dumped("u", i, "p", 1.0, acc=1.0) for i in range(2)))
    table = results.evaluate(results.read_dump(tmp_path / "0.jsonl"))
    assert not any(name.startswith("maj@") for name in table["benchmarks"]["sums"])
    assert table["notes"] == [results.NO_MAJORITY]


def test_a_missing_figure_has_its_own_reason(tmp_path):
    """Here the samples of a problem differ, there one benchmark's reward gives no answer."""

    def table(*rows: tuple[str, str, int, dict]) -> dict:
        lines = [
            json.loads(dumped(f"{name}{p}", i, p, 1.0, acc=1.0, **reward))
            for name, p, k, reward in rows
            for i in range(k)
        ]
        names = [name for name, _, k, _ in rows for _ in range(k)]
        lines = [line | {"label": line["label"].replace("sums", name)} for name, line in zip(names, lines, strict=True)]
        (tmp_path / "0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return results.evaluate(results.read_dump(tmp_path / "0.jsonl"))

    voted = {"pred": "2"}
    found = table(("sums", "p", 4, voted), ("products", "p", 2, voted))
    assert found["notes"] == ["no average of avg@k and maj@k: k differs (products 2, sums 4)"]
    assert sorted(found["average"]) == ["pass@1", "pass@2"]
    assert found["notes"][0] in results.markdown({"target": "a model", "settings": {}, **found})
    found = table(("sums", "p", 2, voted), ("products", "p", 2, {}))
    assert found["notes"] == [f"{results.NO_MAJORITY} (products)"]
    assert table(("sums", "p", 2, voted), ("products", "p", 2, voted))["notes"] == []


def test_a_problem_listed_twice_counts_once(tmp_path):
    """Its samples belong together: four of them, where the others have two."""
    rows = [dumped(uid, i, "p", 1.0) for uid in ("u", "v") for i in range(2)]
    rows += [dumped("w", i, "q", 0.0) for i in range(2)]
    (tmp_path / "0.jsonl").write_text("".join(rows))
    entry = results.evaluate(results.read_dump(tmp_path / "0.jsonl"))["benchmarks"]["sums"]
    assert (entry["problems"], entry["samples"], entry["avg@2"]["value"]) == (2, 6, 0.5)


def test_missing_responses_are_an_error(tmp_path):
    (tmp_path / "0.jsonl").write_text("".join(dumped("u", i, "p", 1.0) for i in range(3)))
    samples = results.read_dump(tmp_path / "0.jsonl")
    with pytest.raises(ValueError, match="1 of 1 problems x 4 responses are missing"):
        results.check_complete(samples, problems=1, k=4, log=tmp_path / "log")
    with pytest.raises(ValueError, match="3 of 2 problems x 3 responses are missing"):
        results.check_complete(samples, problems=2, k=3, log=tmp_path / "log")


def test_a_reward_that_does_not_say_right_or_wrong_has_a_mean_only(tmp_path):
    rows = [dumped("u", i, "p", score, pred="2") for i, score in enumerate([0.3, 1.0])]
    (tmp_path / "0.jsonl").write_text("".join(rows))
    table = results.evaluate(results.read_dump(tmp_path / "0.jsonl"))
    figures = {name: entry["value"] for name, entry in table["benchmarks"]["sums"].items() if "@" in name}
    assert figures == {"score@2": pytest.approx(0.65)} and table["problems"] == {}
    (note,) = table["notes"]
    assert "sums: the mean score only" in note and "said 0.3, and not which answers are right" in note
    assert "| sums | 1 | 0.650 [0.650, 0.650] |" in results.markdown({"target": "a model", "settings": {}, **table})
    (tmp_path / "0.jsonl").write_text(dumped("u", 0, "p", -1.0, acc=False))
    assert results.read_dump(tmp_path / "0.jsonl")[0]["correct"] is False


def test_a_reward_that_failed_is_counted_as_wrong_and_said(tmp_path):
    failed = json.loads(dumped("u", 1, "p", 0.0, acc=0, pred=""))
    failed["label"] = json.dumps({**json.loads(failed["label"]), "failure": "KeyError: 'x'"})
    (tmp_path / "0.jsonl").write_text(dumped("u", 0, "p", 1.0, acc=1, pred="2") + json.dumps(failed) + "\n")
    table = results.evaluate(results.read_dump(tmp_path / "0.jsonl"))
    assert table["benchmarks"]["sums"]["avg@2"]["value"] == 0.5 and table["benchmarks"]["sums"]["maj@2"]["value"] == 1
    (note,) = table["notes"]
    assert "sums: 1 of 2 responses count 0" in note and "first with KeyError: 'x'" in note
    samples = results.read_dump(tmp_path / "0.jsonl")
    results.check_complete(samples, problems=1, k=2, log=tmp_path / "log")
    with pytest.raises(ValueError, match="failed on every response of sums, first with KeyError: 'x'"):
        results.check_complete(samples[1:], problems=1, k=1, log=tmp_path / "log")


def test_a_problem_is_named_by_what_it_asks():
    prompt = [{"role": "user", "content": "1+1="}]
    name = problem_id("sums", prompt, "2")
    assert name == problem_id("sums", [dict(reversed(prompt[0].items()))], "2")
    others = [("more", prompt, "2"), ("sums", [{"role": "user", "content": "1+2="}], "2"), ("sums", prompt, "3")]
    assert name not in {problem_id(*other) for other in others}

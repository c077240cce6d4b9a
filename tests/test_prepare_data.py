"""Data preparation, on small files in the schemas of the hub and of those found elsewhere."""

import json
import subprocess
import sys

import datasets
import pytest
from omegaconf import OmegaConf
from problem_files import HUB, write_sets

from recipe.asyppo.data.prepare_data import main
from recipe.asyppo.data.problem_sets import PROBLEM_SETS, Sources
from recipe.asyppo.data.rows import read_answer, read_question
from recipe.asyppo.reward.math_reward import compute_score

EVALUATION = ["aime24", "aime25", "math500", "olympiadbench", "minerva", "amc23"]
WILD = {
    # The same problems in other schemas.
    "deepmath": [{"prompt": row["question"], "ground_truth": row["final_answer"], "id": "1"} for row in HUB["deepmath"]],
    "math": [{"problem": HUB["math"][0]["problem"], "answer": r"\frac{1}{2}"}],
    "gsm8k": HUB["gsm8k"],
    "aime24": [{"problem": HUB["aime24"][0]["problem"], "answer": "009", "solution": r"\boxed{8}"}],
    "aime25": [{"prompt": HUB["aime25"][0]["problem"], "ground_truth": "70"}],
    "math500": [{"prompt": HUB["math500"][0]["problem"], "ground_truth": HUB["math500"][0]["answer"]}],
    "olympiadbench": HUB["olympiadbench"],
    "minerva": [{"problem": "Compute the luminosity.", "solution": r"so $L = \boxed{4.5e33}$ erg/s", "type": "Astronomy"}],
    "amc23": [{"problem": HUB["amc23"][0]["question"], "question": HUB["amc23"][0]["question"], "answer": 27.0}],
}  # fmt: skip
TRUTHS = {
    **{"math": r"\frac{1}{2}", "gsm8k": "1,234", "aime24": "009", "aime25": "70", "minerva": "4.5e33", "amc23": "27"},
    **{"math500": r"\left( 3, \frac{\pi}{2} \right)", "olympiadbench": "$69$,$84$"},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """Write sets into a folder; the ending says how."""

    def written(sets: dict[str, list[dict]], ending: str = "jsonl"):
        target = tmp_path / f"source_{ending}"
        write_sets(target, sets, ending)
        return str(target)

    return written


def prepare(out, *words: str) -> dict:
    main([*words, "--out", str(out)])
    return json.loads((out / "summary.json").read_text())["sets"]


def rows(out, name: str) -> list[dict]:
    return datasets.load_dataset(
        "parquet", data_files=str(out / PROBLEM_SETS[name].part / f"{name}.parquet"), split="train"
    ).to_list()


@pytest.mark.parametrize(
    ("sets", "ending"), [(HUB, "jsonl"), (HUB, "json"), (HUB, "parquet"), (WILD, "jsonl"), (WILD, "parquet")]
)
def test_every_set_in_every_schema(folder, tmp_path, sets, ending):
    out = tmp_path / "out"
    summary = prepare(out, "--source", folder(sets, ending))
    assert list(summary) == list(PROBLEM_SETS)
    for name, truth in TRUTHS.items():
        row = rows(out, name)[0]
        assert row["data_source"] == name and row["reward_model"] == {"style": "rule", "ground_truth": truth}
        assert row["prompt"] == [
            {
                "role": "user",
                "content": row["extra_info"]["question"]
                + "\nPlease reason step by step, and put your final answer within \\boxed{}.",
            }
        ]
        assert compute_score(name, rf"\boxed{{{truth}}}", truth)["score"] == 1
    assert [row["reward_model"]["ground_truth"] for row in rows(out, "deepmath")] == [str(k) for k in range(40)]


def test_csv_is_kept_as_it_is_written(folder, tmp_path):
    source = folder({"aime24": WILD["aime24"], "amc23": WILD["amc23"]}, "csv")
    prepare(tmp_path / "out", "--source", source, "--sets", "aime24", "amc23")
    answers = [rows(tmp_path / "out", name)[0]["reward_model"]["ground_truth"] for name in ("aime24", "amc23")]
    assert answers == ["009", "27.0"]


def test_verl_reads_all_files_together(folder, tmp_path, toy):
    from transformers import AutoTokenizer
    from verl.utils.dataset.rl_dataset import RLHFDataset

    prepare(tmp_path / "out", "--source", folder(HUB))
    files = sorted(map(str, (tmp_path / "out").rglob("*.parquet")))
    config = OmegaConf.create(
        {"max_prompt_length": 300, "cache_dir": str(tmp_path / "verl"), "filter_overlong_prompts_workers": 1}
    )
    data = RLHFDataset(files, AutoTokenizer.from_pretrained(toy / "actor"), config)
    assert len(data) == sum(map(len, HUB.values()))


def test_every_row_is_kept_or_counted(folder, tmp_path):
    bad = [
        {"question": "", "final_answer": "1"},
        {"question": "What is missing here?", "final_answer": None},
        {"question": "What is missing there?", "final_answer": "  "},
        {"question": r"Find the limit of \( a_n = 3 + 1/n \) as n  grows.", "final_answer": "3"},
        {"question": "Write a very long number.", "final_answer": "1" * 1001},
        {"question": "Convert (0, 3) to polar form.", "final_answer": "x"},
    ]
    summary = prepare(
        tmp_path / "out", "--source", folder(HUB | {"deepmath": HUB["deepmath"] + bad}), "--deepmath-sample", "30"
    )
    figures = summary["deepmath"]
    assert figures["dropped"] == {
        **{"no question": 1, "no answer": 2, "repeated in the set": 1, "answer longer than 1000 characters": 1},
        **{"same as in math500": 1, "not in the sample": 10},
    }
    assert figures["read"] == 46 == figures["kept"] + sum(figures["dropped"].values())
    assert len(rows(tmp_path / "out", "deepmath")) == figures["kept"] == 30


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    source = folder(HUB)
    outs = {key: tmp_path / key for key in ("one", "two", "other")}
    for key, out in outs.items():
        prepare(out, "--source", source, "--deepmath-sample", "20", "--seed", "7" if key == "other" else "3")
    content = {key: {path.name: path.read_bytes() for path in out.rglob("*.*")} for key, out in outs.items()}
    assert content["one"] == content["two"] and len(content["one"]) == len(PROBLEM_SETS) + 1
    kept = {key: {row["extra_info"]["index"] for row in rows(out, "deepmath")} for key, out in outs.items()}
    assert kept["one"] == kept["two"] != kept["other"] and len(kept["one"]) == 20
    for name in EVALUATION:
        assert content["one"][f"{name}.parquet"] == content["other"][f"{name}.parquet"]


def test_prompts_over_the_limit_are_dropped_and_counted(folder, tmp_path, toy):
    """The toy tokenizer has one token a byte and a template that adds none."""
    source = folder(HUB | {"gsm8k": HUB["gsm8k"] + [{"question": "é" * 100, "answer": "#### 1"}]})
    limit = 200
    summary = prepare(
        *(tmp_path / "out", "--source", source, "--sets", "gsm8k", "--template", "{question}!"),
        *("--tokenizer", str(toy / "actor"), "--max-prompt-length", str(limit)),
    )["gsm8k"]
    assert summary["dropped"] == {"prompt longer than 200 tokens": 1}
    length = len(HUB["gsm8k"][0]["question"]) + 1
    assert summary["prompt_tokens"] == {"median": length, "longest": length}


def test_without_a_tokenizer_it_says_that_lengths_are_unchecked(folder, tmp_path, capsys):
    prepare(tmp_path / "out", "--source", folder(HUB), "--sets", "aime24")
    printed = capsys.readouterr().out
    assert "| aime24 | aime24.jsonl | 1 | 1 | not counted | none |" in printed
    assert "prompt lengths were not checked" in printed


def test_other_sets_stay_as_they_are(folder, tmp_path):
    source, out = folder(HUB), tmp_path / "out"
    prepare(out, "--source", source, "--sets", "aime24", "amc23")
    before = (out / "eval/amc23.parquet").read_bytes()
    summary = prepare(out, "--source", source, "--sets", "aime24", "--template", "plain")
    assert list(summary) == ["aime24", "amc23"] and (out / "eval/amc23.parquet").read_bytes() == before
    assert summary["aime24"]["settings"]["template"] == "{question}" != summary["amc23"]["settings"]["template"]


def test_a_failure_writes_nothing(folder, tmp_path):
    source = folder(HUB | {"amc23": [{"question": "", "answer": 1.0}]})
    with pytest.raises(ValueError, match="amc23: none of the 1 rows"):
        main(["--source", source, "--sets", "aime24", "amc23", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "--source nowhere: not `hub`, not a folder"),
        (["aime24=nowhere"], "--source aime24=nowhere: there is no file nowhere"),
        (["{folder}"], "no file for aime25 .*--sets and --against"),
    ],
)
def test_sources_that_are_not_there(folder, words, message):
    source = folder({"aime24": HUB["aime24"]})
    with pytest.raises(ValueError, match=message):
        Sources.parse([word.format(folder=source) for word in words]).find("aime25")


def test_a_packed_file_is_named_and_no_other_source_takes_its_place(folder, tmp_path):
    source = folder({})
    (tmp_path / "source_jsonl/aime24.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"aime24.jsonl.gz is not one of .parquet, .jsonl, .json, .csv"):
        main(["--source", source, "hub", "--sets", "aime24", "--out", str(tmp_path / "out")])


def test_a_folder_may_hold_other_files_and_capital_letters(folder, tmp_path):
    source = folder(HUB)
    (tmp_path / "source_jsonl/aime24.jsonl").rename(tmp_path / "source_jsonl/AIME24.JSONL")
    (tmp_path / "source_jsonl/aime24.md").write_text("where it is from")
    assert prepare(tmp_path / "out", "--source", source, "--sets", "aime24")["aime24"]["source"] == "AIME24.JSONL"


def test_an_evaluation_set_with_an_unusable_question_still_keeps_the_others_out(folder, tmp_path):
    chat = {"problem": [{"role": "assistant", "content": "Find it."}], "answer": "1"}
    same = {"question": HUB["aime24"][0]["problem"], "final_answer": "9"}
    source = folder(HUB | {"aime24": [chat, *HUB["aime24"]], "deepmath": [same, *HUB["deepmath"]]})
    summary = prepare(tmp_path / "out", "--source", source)
    assert summary["deepmath"]["dropped"] == {"same as in aime24": 1}
    assert summary["aime24"]["dropped"] == {"prompt is not one question of a user": 1}


def test_two_files_for_one_set_are_refused(folder, tmp_path):
    source = folder({"aime24": HUB["aime24"]})
    (tmp_path / "source_jsonl/aime24.csv").write_text("problem,answer\nx,1\n")
    with pytest.raises(ValueError, match="both aime24"):
        Sources.parse([source]).find("aime24")


def test_the_hub_is_asked_for_a_fixed_revision(monkeypatch):
    """Only the download is replaced: what would be asked for, and that the fields are those of the table."""
    asked = {}

    def load_dataset(path, name, *, split, revision):
        asked.update(path=path, name=name, split=split, revision=revision)
        return datasets.Dataset.from_list([row | {"r1_solution_1": "long"} for row in HUB["olympiadbench"]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data, source = Sources.parse(["hub"]).load("olympiadbench")
    assert data == [{key: row[key] for key in ("question", "final_answer")} for row in HUB["olympiadbench"]]
    assert source == "Hothan/OlympiadBench@91184b5"
    assert asked["name"] == "OE_TO_maths_en_COMP" and asked["split"] == "train" and len(asked["revision"]) == 40


def test_the_fields_of_the_table_are_fields_that_are_read():
    for row in PROBLEM_SETS.values():
        assert read_question({row.question: "q"}) == "q" and read_answer({row.answer: r"\boxed{a}"}) == "a"
        assert row.part == "train" or row.name in EVALUATION


def test_the_command_shows_progress_and_a_table(folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "recipe.asyppo.data.prepare_data",
        "--source",
        folder(HUB),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([*command, "--sets", "gsm8k"], capture_output=True, text=True, check=True)
    assert "| gsm8k | gsm8k.jsonl | 1 | 1 |" in done.stdout and "gsm8k: 100%" in done.stderr
    assert (tmp_path / "out/train/gsm8k.parquet").exists() and not list((tmp_path / "out").rglob("*.partial"))
    failed = subprocess.run([*command, "--source", "nowhere"], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("prepare_data: --source nowhere: not `hub`")

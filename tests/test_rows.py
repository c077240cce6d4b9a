"""From a file to question and answer: the same text, or a reason; for any value that JSON, CSV or Parquet can hold."""

import csv
import json
import math
import tempfile
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.asyppo.data.prepare_data import main
from recipe.asyppo.data.rows import Unusable, read_answer, read_question, read_rows

TRICKY = ["None", "NA", "null", "nan", "NaN", "inf", "-inf", "Infinity", "true", "1e5", "007", "2024-01-02", "1_000"]
TRICKY += ["2024-01-02T03:04:05Z", "12345678901234567890", "0.10", "+1", "1,234", "a\u2028b", "\x00", "[1]", "{'a': 1}"]
# What is found inside a text, a box or what follows ####, has tests of its own.
texts = (st.sampled_from(TRICKY) | st.text(max_size=20)).filter(lambda text: "####" not in text and "\\" not in text)
scalars = st.none() | st.booleans() | st.integers() | st.integers(2**52, 2**70) | st.floats() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2), max_leaves=5
)


def prepared(path: Path) -> dict[int, str]:
    """Run the command on a file; the answers by the number of the row."""
    main(["--source", f"math500={path}", "--sets", "math500", "--against", "--out", str(path.parent)])
    figures = json.loads((path.parent / "summary.json").read_text())["sets"]["math500"]
    rows = pq.read_table(path.parent / "eval/math500.parquet").to_pylist()
    assert figures["read"] == len(rows) + sum(figures["dropped"].values())
    assert all(row["extra_info"]["question"] == f"Question {row['extra_info']['index']}" for row in rows)
    return {row["extra_info"]["index"]: row["reward_model"]["ground_truth"] for row in rows}


def expected(value: object, number: Callable[[float], str]) -> str | None:
    """The text of a value of JSON or Parquet, None where a reason is due; ``number`` writes a float."""
    if isinstance(value, list):
        parts = [None if isinstance(part, list) else expected(part, number) for part in value]
        return ", ".join(parts) if parts and None not in parts else None
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return None
        return value.strip() or None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return number(value) if math.isfinite(value) else None
    return str(value) if isinstance(value, int | Decimal) else None


def as_json(number: float) -> str:
    """JSON has text; what is written as 27.0 is 27."""
    return json.dumps(number).removesuffix(".0")


def with_digits(number: float) -> str:
    """Parquet has a number without a text; a whole one is written with all its digits."""
    return str(int(number)) if number.is_integer() else repr(number)


def check(answers: dict[int, str], wanted: list[str | None]) -> None:
    for index, text in enumerate(wanted):
        if text is not None and len(text) > 1000:
            text = None
        assert answers.get(index) == text
    assert len(answers) <= len(wanted)


@settings(max_examples=60, deadline=None)
@given(st.lists(values, max_size=15), st.booleans(), st.sampled_from(["jsonl", "json"]))
def test_json_keeps_every_text(answers, ascii_only, ending):
    if not ascii_only:  # UTF-8 cannot hold half a surrogate pair, an escape can
        answers = json.loads(json.dumps(answers, ensure_ascii=False).encode(errors="replace"))
    answers = ["at least one", *answers]
    rows = [{"problem": f"Question {number}", "answer": answer} for number, answer in enumerate(answers)]
    written = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"rows.{ending}")
        path.write_text("\n".join(written) if ending == "jsonl" else f"[{', '.join(written)}]", encoding="utf-8")
        check(prepared(path), [expected(answer, as_json) for answer in answers])


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, max_size=15))
def test_csv_keeps_every_text(answers):
    answers = ["at least one", *(text.encode(errors="replace").decode() for text in answers)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.csv")
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("problem", "answer"), *((f"Question {n}", a) for n, a in enumerate(answers))])
        check(prepared(path), [answer.strip() or None for answer in answers])


COLUMNS = [
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pa.uint64(), st.integers(2**53, 2**64 - 1)),
    (pa.float64(), st.floats(-1e15, 1e15) | st.sampled_from([math.nan, math.inf, 27.0, 2.0**60])),
    (pa.bool_(), st.booleans()),
    (pa.decimal128(20, 2), st.decimals(-(10**9), 10**9, places=2)),
    (pa.string(), texts.map(lambda text: text.encode(errors="replace").decode())),
    (pa.list_(pa.string()), st.lists(st.sampled_from(TRICKY), max_size=3)),
    (pa.list_(pa.int64()), st.lists(st.integers(2**53, 2**63 - 1), max_size=3)),
    (pa.struct({"a": pa.string()}), st.builds(dict, a=st.sampled_from(TRICKY))),
    (pa.date32(), st.dates()),
    (pa.timestamp("us"), st.datetimes()),
    (pa.binary(), st.binary(max_size=5)),
]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_parquet_keeps_every_text(data):
    kind, strategy = data.draw(st.sampled_from(COLUMNS))
    answers = [None, *data.draw(st.lists(strategy | st.none(), max_size=15))]
    table = {
        "problem": [f"Question {number}" for number in range(len(answers))],
        "answer": pa.array(answers, kind),
        "solution": [r"\boxed{at least one}"] + [None] * (len(answers) - 1),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.parquet")
        pq.write_table(pa.table(table), path)
        wanted = [
            None if isinstance(answer, date | bytes | dict) else expected(answer, with_digits) for answer in answers
        ]
        check(prepared(path), ["at least one", *wanted[1:]])


messages = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": values})


@settings(max_examples=300, deadline=None)
@given(values | st.lists(messages, max_size=3) | messages)
def test_a_question_is_a_text_that_somebody_wrote_or_a_reason(value):
    value = json.loads(json.dumps(value))
    users = [
        m for m in (value if isinstance(value, list) else [value]) if isinstance(m, dict) and m.get("role") != "system"
    ]
    try:
        question = read_question({"prompt": value})
    except Unusable as reason:
        assert str(reason) in (
            *("no question", "question is neither text nor a number", "question is not valid Unicode"),
            "prompt is not one question of a user",
        )
        assert isinstance(value, list | dict) or expected(value, with_digits) is None
    else:
        assert question == expected(users[0]["content"] if isinstance(value, list | dict) else value, with_digits)


SYSTEM, USER = {"role": "system", "content": "Think."}, {"role": "user", "content": " Compute 3*3. "}


@pytest.mark.parametrize(
    ("value", "question"),
    [
        ([SYSTEM, USER], "Compute 3*3."),
        (USER, "Compute 3*3."),
        ([{"role": "user", "content": [{"type": "text", "text": "Compute."}]}], "Compute."),
        ([USER, {"role": "assistant", "content": "9"}], "prompt is not one question of a user"),
        ([USER, USER], "prompt is not one question of a user"),
        ([{"from": "human", "value": "Compute."}], "prompt is not one question of a user"),
        ({"text": "Compute."}, "prompt is not one question of a user"),
        (["Compute."], "prompt is not one question of a user"),
        ([SYSTEM], "no question"),
        ([], "no question"),
        (0, "0"),
    ],
)
def test_a_chat_is_the_question_of_its_user_or_a_reason(value, question):
    try:
        assert read_question({"problem": None, "prompt": value}) == question
    except Unusable as reason:
        assert str(reason) == question


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"solution": "We get 5."}, "no answer"),
        ({"answer": math.nan}, "no answer"),
        ({"final_answer": [], "answer": "x"}, "x"),
        ({"final_answer": ["1", "2"]}, "1, 2"),
        ({"final_answer": ["1", None]}, "one of several answers is empty"),
        ({"final_answer": ["1", ["2"]]}, "answer is neither text nor a number"),
        ({"answer": {"value": 1}}, "answer is neither text nor a number"),
        ({"answer": math.inf}, "answer is neither text nor a number"),
        ({"answer": "so #### 1, or #### 2 "}, "2"),
        ({"answer": r"so \boxed{1}, no, \boxed{\frac{1}{2}}."}, r"\frac{1}{2}"),
        ({"answer": "no marker 12"}, "no #### before the answer"),
        ({"answer": "12"}, "12"),
        ({"answer": "#### "}, "no answer"),
        ({"final_answer": "3 cm"}, "3 cm"),
        ({"answer": "\ud800"}, "answer is not valid Unicode"),
    ],
)
def test_the_answer_of_a_row_of_gsm8k(row, answer):
    try:
        assert read_answer(row, needs_marker=True) == answer
    except Unusable as reason:
        assert str(reason) == answer


def test_only_gsm8k_needs_its_marker():
    assert read_answer({"answer": "the set of primes"}) == "the set of primes"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "holds no rows"),
        ("rows.csv", b"problem,answer\n", "holds no rows"),
        ("rows.parquet", b"", "cannot be read as parquet"),
        ("rows.parquet", b"PAR1 and not much else", "cannot be read as parquet"),
        ("rows.jsonl", b'{"answer": "1"}\n{"answer": \n', r"cannot be read as jsonl: .*line 3 column 1"),
        ("rows.jsonl", b'{"answer": "1"}\n"2"\n', "value 2 is not an object"),
        ("rows.json", b'{"answer": "1", "answer": "2"}', r"a field occurs twice among \['answer', 'answer'\]"),
        ("rows.json", b"[" * 100_000, "cannot be read as json"),
        ("rows.jsonl", '{"answer": "é"}'.encode("latin-1"), "cannot be read as jsonl: 'utf-8' codec"),
        ("rows.jsonl", '{"answer": "1"}'.encode("utf-16"), "cannot be read as jsonl: 'utf-8' codec"),
        ("rows.jsonl", b"\x1f\x8b\x08\x00", "cannot be read as jsonl: 'utf-8' codec"),
        ("rows.csv", b"problem,answer\nq,1,2\n", "row 1 has 3 values, the header has 2"),
        ("rows.csv", b"answer,answer\n1,2\n", "a field occurs twice"),
        ("rows.csv", b'problem,answer\n"q"x,1\n', "cannot be read as csv"),
        ("rows.jsonl.gz", b"", "is not one of .parquet, .jsonl, .json, .csv; unpack or convert it"),
        ("rows.txt", b"", "is not one of"),
        ("rows", b"", "is not one of"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"--source: .*/{name} .*{message}|--source: .*/{name}.*{message}"):
        read_rows(tmp_path / name)


def test_a_parquet_file_with_a_column_twice_is_refused(tmp_path):
    pq.write_table(
        pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["answer", "answer"]), tmp_path / "rows.parquet"
    )
    with pytest.raises(ValueError, match=r"rows.parquet cannot be read as parquet: a field occurs twice"):
        read_rows(tmp_path / "rows.parquet")


@pytest.mark.parametrize("name", ["ROWS.JSONL", "answer=1 [x]*?.jsonl", "rows.v2.json"])
def test_odd_names_marks_of_byte_order_and_long_fields_are_read(tmp_path, name):
    row = {"problem": "x", "answer": "1" * 200_000}
    (tmp_path / name).write_text("\n" + json.dumps(row, indent=1) + "\n\r\n", encoding="utf-8")
    assert read_rows(tmp_path / name) == [row]
    (tmp_path / "rows.csv").write_text(f"problem,answer,other\r\nx,{row['answer']},\n\n", encoding="utf-8-sig")
    assert read_rows(tmp_path / "rows.csv") == [row | {"other": ""}]

"""The mathematics reward: right, wrong, malformed and run-away answers, as verl calls it."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import psutil
import pytest
from omegaconf import OmegaConf

from recipe.asyppo.reward.answer_text import canonical, last_boxed, numbers, tidy
from recipe.asyppo.reward.math_reward import LONGEST_ANSWER, GradingPool, compute_score

RIGHT = [
    # (truth, answer): numbers
    ("204", "204.0"),
    ("27", r"27 \text{ miles}"),
    ("1080", "1,080"),
    ("10,\\!080", "10080"),
    (r"\$32,\!348", "32348"),
    ("0.5", r"\frac12"),
    (r"\frac{3}{4}", "3/4"),
    (r"\frac13", "0.333333"),
    (r"1\frac{4}{5}", r"\dfrac{9}{5}"),
    ("4.5e33", r"4.5 \times 10^{33}"),
    ("-1./3", r"-\frac{1}{3}"),
    ("20.39", "20.3901"),
    ("62.5%", r"\frac{5}{8}"),
    ("62.5%", r"62.5\%"),
    ("4.2", r"4.2\%"),
    (r"90^\circ", "90"),
    ("145", r"145 \text{ degrees}"),
    ("166", r"166 \text{ cm}^2"),
    ("52_8", "52_{8}"),
    ("52_8", "52"),
    ("152A_{11}", "152A"),
    ("S_3", "S_{3}"),
    ("10^{6}", "1,000,000"),
    ("4.5e33", "4.50001e33"),
    (r"6.02 \cdot 10^{23}", r"6.0201 \times 10^{23}"),
    # expressions
    (r"3\sqrt{13}", r"\sqrt{117}"),
    ("x^2 + 2x + 1", "(x+1)^2"),
    (r"\binom{2n}{n}", r"\frac{(2n)!}{(n!)^2}"),
    ("6 - 5i", "-5i + 6"),
    (r"\frac{1}{2}(\exp{a*t} + \exp{-a*t})", r"\cosh(at)"),
    (r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}", r"(E_1 + 2E_2)/3"),
    # names and equations
    ("5", "x = 5"),
    ("x=5", "5"),
    ("f(x)=2 x", r"2 \cdot x"),
    (r"m_{\max }=n^{2}-n-1", "n^2 - n - 1"),
    ("5x - 7y + 11z + 4 = 0", "10x - 14y + 22z + 8 = 0"),
    # sets, tuples, intervals, matrices
    ("$69$,$84$", "84, 69"),
    ("1,3,5", r"1, 3 \text{ and } 5"),
    ("1,2", r"x=1 \text{ or } x=2"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    ("(1,8,19), (2,7,13)", "(2,7,13),(1,8,19)"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    ("(3,4]", r"3 < x \le 4"),
    (r"x \in [-2,7]", "[-2,7]"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} -\frac{1}{3} \\ \frac{2}{3} \end{pmatrix}"),
    # words
    (r"\text{(C)}", "C"),
    ("Yes", r"\text{yes}"),
    (r"\text{Evelyn}", "Evelyn"),
    ("E_{1},E_{2}", "E_1, E_2"),
]
WRONG = [
    ("204", "205"),
    ("10000", "10001"),
    ("3", "3.0001"),
    ("20.39", "20.4"),
    (r"\frac13", "0.33"),
    ("1e-8", "0"),
    ("2.88e-19", "2.9e-19"),
    ("1.325e-27", r"\frac{1}{10^{20}}"),
    ("52_8", "52_9"),
    ("52_8", "53"),
    ("S_3", "S"),
    ("D_4", "D"),
    ("V_4", "V"),
    ("10^{6}", "1000001"),
    ("10^6", r"10^6 + 1"),
    (r"2 \cdot 10^{8}", "200000001"),
    ("4.5e33", "4.502e33"),
    ("(3,2)", "(2,3)"),
    ("69,84", "69"),
    ("69", "69, 84"),
    ("x=5", "y=5"),
    ("AB = BA", "AB = BA + 1"),
    ("f(0) = 0", "f(0) = 1"),
    ("f'(x) = f(x)", "f'(x) = f(x) + 1"),
    ("x^2 + 2x + 1", "x^2 + 2x + 2"),
    (r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{3}"),
    (r"\infty", r"-\infty"),
    ("[0, 1)", "[0, 1]"),
    (r"\aleph_0", r"\aleph_1"),
    ("P(A)", "PA"),
    ("Yes", "No"),
    ("C", "D"),
    (r"\text{east}", r"\text{west}"),
]
MALFORMED = [
    *(r"\frac{", r"\frac{1}{", r"\sqrt", "^", "_", r"\left(", "}{", r"\begin{pmatrix} 1 & 2 \\", "\x00", r"\\\\"),
    *("=", "<>", "+", "%", ",", "\N{SLIGHTLY SMILING FACE}"),
]
RUN_AWAY = [
    *(r"9^{9^{9^{9}}}", r"10^{10^{10}}", r"1000000000!", r"(x+1)^{100000}", r"\sum_{k=1}^{10000000} \frac{1}{k}"),
    "(" * 300 + "x" + ")" * 300,
]


def score(truth: str, response: str, **limits) -> dict:
    return compute_score("set", response, truth, {}, **limits)


@pytest.mark.parametrize(("truth", "answer"), RIGHT)
def test_right_answers_score_one(truth, answer):
    assert score(truth, f"Hence the answer is $\\boxed{{{answer}}}$.")["score"] == 1


@pytest.mark.parametrize(("truth", "answer"), WRONG)
def test_wrong_answers_score_zero(truth, answer):
    assert score(truth, f"Hence the answer is $\\boxed{{{answer}}}$.") | {"pred": ""} == {
        "score": 0,
        "acc": 0,
        "pred": "",
        "gave_up": 0,
    }


@pytest.mark.parametrize("answer", MALFORMED)
def test_malformed_answers_score_zero(answer):
    assert score(r"\frac{1}{2}", f"\\boxed{{{answer}}}")["score"] == 0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} and so on", r"\frac{1}{2}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed {3}", "3"),
        (r"$\boxed{3}$ and $\boxed{5}$", "3, 5"),
        (r"\boxed{3}, \boxed{4}, or \boxed{5}", "3, 4, 5"),
        (r"$\boxed{5}$. $\boxed{5}$", "5"),
        (r"\boxed{5}$, $\boxed{5}$", "5"),
        (r"the answer is 7", None),
        (r"\boxed{}", None),
        (r"\boxed{1} then \boxed{\frac{1}{2", None),
        (r"\boxed 5", None),
    ],
)
def test_the_last_box_is_the_answer(response, answer):
    assert last_boxed(response) == answer


def test_a_response_without_a_box_scores_zero():
    assert score("7", "The answer is 7. #### 7") == {"score": 0, "acc": 0, "pred": "", "gave_up": 0}


def test_numbers_are_read_exactly():
    assert numbers("-1,234.5") == [Fraction("-1234.5")]
    assert numbers(r"4.5 \times 10^{33}") == [Fraction(45 * 10**32)]
    assert numbers(r"-\frac{3}{4}") == numbers("-3/4") == numbers("-.75") == [Fraction(-3, 4)]
    assert numbers("50%") == [50, Fraction(1, 2)]
    assert numbers("1/0") == numbers("1,23") == numbers("x") == numbers("1e999999999") == []


@pytest.mark.parametrize(("truth", "answer"), RIGHT + WRONG)
def test_tidying_twice_changes_nothing(truth, answer):
    for text in (truth, answer):
        assert tidy(tidy(text)) == tidy(text)


@pytest.mark.parametrize("answer", RUN_AWAY)
def test_run_away_expressions_are_given_up_in_time_and_the_next_answer_is_right(answer):
    limits = {"processes": 1, "seconds": 1.0, "megabytes": 512}
    score("x", r"\boxed{y}", **limits)
    start = time.monotonic()
    result = score(r"\sqrt{x}", f"\\boxed{{{answer}}}", **limits)
    assert result["score"] == 0 and time.monotonic() - start < 3
    assert score(r"\sqrt{8}", r"\boxed{2\sqrt{2}}", **limits)["score"] == 1


def test_giving_up_is_reported():
    assert score(r"\sqrt{x}", r"\boxed{1000000000!}", processes=1, seconds=1.0)["gave_up"] == 1


def test_memory_is_bounded():
    """2^(2^32) has 0.5 GB: refused at once where that is not allowed, computed until time is up where it is."""
    answer = r"\boxed{2^{2^{32}}}"
    for megabytes, gave_up in ((200, 0), (2000, 1)):
        assert score(r"\sqrt{x}", answer, processes=1, seconds=4.0, megabytes=megabytes)["gave_up"] == gave_up


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{" + "9" * 100_000 + "}",
        r"\boxed{" * 10_000,
        r"\boxed{1}" * 10_000,
        r"\boxed{" + "{" * 50_000 + "}" * 50_000 + "}",
        r"\boxed{" + "\\" * 99_999 + "}",
        "a" * 1_000_000,
    ],
)
def test_long_responses_take_no_time(response):
    start = time.monotonic()
    result = score(r"\frac{1}{2}", response)
    assert result["score"] == 0 and len(result["pred"]) <= 2 * LONGEST_ANSWER
    assert time.monotonic() - start < 1


def test_equal_answers_share_one_vote():
    """verl's majority vote compares ``pred``: one half, three ways, outvotes two thirds, twice."""
    from verl.trainer.ppo.metric_utils import process_validation_metrics

    answers = [r"\frac{1}{2}", "0.5", "1/2", r"\frac{2}{3}", "2/3"]
    results = [score("0.5", f"\\boxed{{{answer}}}") for answer in answers]
    infos = {key: [result[key] for result in results] for key in results[0]}
    metrics = process_validation_metrics(["set"] * 5, ["one prompt"] * 5, infos)["set"]["acc"]
    assert metrics["mean@5"] == pytest.approx(0.6)
    # Drawn five of five with replacement, the majority is right more often than the mean answer.
    assert metrics["maj@5/mean"] > 0.64
    assert canonical("x^2") == canonical("x^{2}") != canonical("x^3")


def test_many_threads_get_the_scores_of_one():
    """verl calls from the threads of an executor, where math-verify's own time-outs fail."""
    jobs = [(pair, 1) for pair in RIGHT] + [(pair, 0) for pair in WRONG]
    with ThreadPoolExecutor(16) as executor:
        scores = list(executor.map(lambda job: score(job[0][0], f"\\boxed{{{job[0][1]}}}")["score"], jobs * 3))
    assert scores == [want for _, want in jobs] * 3


def test_a_process_that_is_killed_from_outside_is_replaced():
    before, pool = set(psutil.Process().children()), GradingPool(1, 5.0, 1024)
    assert pool.equal(r"\sqrt{8}", r"2\sqrt{2}") is True
    (supervisor,) = set(psutil.Process().children()) - before
    for process in (supervisor, *supervisor.children()):
        process.kill()
    assert pool.equal(r"\sqrt{8}", r"2\sqrt{2}") is None
    assert pool.equal(r"\sqrt{8}", r"2\sqrt{2}") is True


def test_no_process_outlives_a_killed_reward_worker():
    """Also while one of them is busy with a run-away expression."""
    program = (
        "import threading, time\n"
        "from recipe.asyppo.reward.math_reward import compute_score\n"
        "limits = dict(processes=2, seconds=2.0)\n"
        "compute_score('', r'\\boxed{y}', 'x', **limits)\n"
        "threading.Thread(target=compute_score, args=('', r'\\boxed{1000000000!}', r'\\sqrt{x}'), kwargs=limits).start()\n"
        "time.sleep(1.5)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    worker = psutil.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline() == "ready\n"
    family = worker.children(recursive=True)
    assert len(family) == 2
    worker.kill()
    worker.wait()
    _, alive = psutil.wait_procs(family, timeout=6)
    assert alive == []


def test_without_math_verify_it_cannot_be_imported():
    """verl counts a call that raises as a failed response and trains on, so nothing may wait for the first such call."""
    code = "import sys; sys.modules['math_verify'] = None; import recipe.asyppo.reward.math_reward"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and "ImportError: recipe.asyppo.reward.math_reward needs math-verify" in run.stderr
    assert "pip install 'verl[vllm,fsdp,math]==0.9.1'" in run.stderr


def test_a_process_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="pip install"):
        GradingPool(1, 5.0, 1024).equal("x", "y")


@pytest.mark.parametrize(
    "path", ["pkg://recipe.asyppo.reward.math_reward", "{root}/recipe/asyppo/reward/math_reward.py"]
)
def test_verl_loads_it_with_its_limits(root, path):
    from verl.trainer.ppo.reward import get_custom_reward_fn

    function = {
        "path": path.format(root=root),
        "name": "compute_score",
        "reward_kwargs": {"seconds": 1.0, "processes": 1},
    }
    reward = get_custom_reward_fn(OmegaConf.create({"reward": {"custom_reward_function": function}}))
    assert (
        reward(data_source="s", solution_str=r"\boxed{\sqrt{8}}", ground_truth=r"2\sqrt{2}", extra_info={})["score"]
        == 1
    )
    assert (
        reward(data_source="s", solution_str=r"\boxed{1000000000!}", ground_truth=r"\sqrt{x}", extra_info={})["gave_up"]
        == 1
    )


def graders() -> list[psutil.Process]:
    """The grading processes below this one."""
    return [child for child in psutil.Process().children(recursive=True) if "grader.py" in " ".join(child.cmdline())]


@pytest.mark.ray
def test_in_verls_reward_workers(compose, toy):
    """Real reward workers of verl, in their own processes, score a batch; nothing of theirs is left when they are gone."""
    import ray
    import torch
    from transformers import AutoTokenizer
    from verl import DataProto
    from verl.experimental.reward_loop.reward_loop import RewardLoopManager

    function = "reward.custom_reward_function"
    limits = f"+{function}.reward_kwargs={{seconds: 1.0, processes: 1}}"
    config = compose(f"{function}.path=pkg://recipe.asyppo.reward.math_reward", limits, "reward.num_workers=2")
    tokenizer = AutoTokenizer.from_pretrained(toy / "actor")
    pairs = [(r"\sqrt{8}", r"2\sqrt{2}"), ("5", "6"), ("5", "x=5"), (r"\sqrt{y}", r"1000000000!")]
    ids = [tokenizer(f"\\boxed{{{answer}}}").input_ids for _, answer in pairs]
    width = max(map(len, ids))
    responses = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * (1 + len(row)) + [0] * (width - len(row)) for row in ids])
    batch = DataProto.from_dict(
        tensors={"prompts": torch.zeros(4, 1, dtype=torch.long), "responses": responses, "attention_mask": mask},
        non_tensors={
            "data_source": np.array(["set"] * 4, dtype=object),
            "reward_model": np.array([{"ground_truth": truth} for truth, _ in pairs], dtype=object),
            "extra_info": np.array([{} for _ in pairs], dtype=object),
        },
    )
    before = set(graders())
    ray.init(num_cpus=2, runtime_env={"env_vars": {"VERL_PLATFORM": "cpu"}})
    try:
        scored = RewardLoopManager(config).compute_rm_score(batch)
        started = set(graders()) - before
    finally:
        ray.shutdown()
    assert scored.batch["rm_scores"].sum(-1).tolist() == [1, 0, 1, 0]
    assert scored.non_tensor_batch["gave_up"].tolist() == [0, 0, 0, 1]
    assert started and psutil.wait_procs(started, timeout=10)[1] == []

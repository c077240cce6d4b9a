"""The mathematics reward: right, wrong, malformed and run-away answers, as verl calls it."""

import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from recipe.asyppo.reward.math_reward import LONGEST_ANSWER, Graders, compute_score, last_boxed, number, plain

# A line: a truth, and answers that are equal to it.
RIGHT = r"""
204             | 204.0 | {204} | \text{204} | \mathbf{204} | \left(204\right) | x = 204 | m+n = 204
\pi             | \pi \approx 3.14 | x = \pi \approx 3.1416
\sqrt{2}        | \sqrt{2} \approx 1.414 | x = \sqrt2 \approx 1.41
7.07            | \frac{9\pi}{4} \approx 7.07
\frac{1}{3}     | \frac13 \approx 0.333
204             | P(3) = 204 | |AB| = 204 \text{ cm}
27              | 27 \text{ miles} | 27 \text{ m/s}^2 | 27\,\mathrm{m}\,\mathrm{s}^{-1} 
27              | 27 \text{ m}^{2} | 27 \text{ months} | 27 \text{ kg} \text{ m}^{-3} | 27 \text{ in} | 27 \text{ cm2}
27              | 27 meters | \$27.00 | 3^3 | 3 \cdot 9 = 27
1080            | 1,080 | 1{,}080 | 1 080 | 1,\!080 | 1.08 \times 10^3 | 1.08e3
0.5             | \frac12 | .5 | {1 \over 2} | 1/2 | 50\% | 2^{-1} | \approx 0.5
1\frac{4}{5}    | \dfrac{9}{5} | 1 4/5 | 1.8
62.5%           | \frac{5}{8} | 62.5\% | 62.5 \text{ percent} | 62.5
0.1\overline{6} | \frac{1}{6}
90^\circ        | 90 | 90 \text{ degrees} | 90^{\circ}
\cos 36^\circ   | \frac{1+\sqrt5}{4} | \cos\frac{\pi}{5}
3\sqrt{13}      | \sqrt{117} | 3√13 | 3*sqrt(13)
x^2+2x+1        | (x+1)^2 | x² + 2x + 1
\sqrt{2/n}      | \frac{\sqrt2}{\sqrt n}
\binom{2n}{n}   | \frac{(2n)!}{(n!)^2}
\sum_{k=1}^n k  | \frac{n(n+1)}{2} | \sum_{j=1}^n j
6 - 5i          | -5i + 6 | 6 - 5\mathrm{i}
\ln 2           | \log 2
E_1+2E_2        | 2E_2 + E_1
f'(x)           | f^{\prime}(x)
5x - 7y + 4 = 0 | 10x - 14y + 8 = 0 | y = \frac{5x+4}{7}
f(x) = 2x       | 2 \cdot x | f(x)=x+x
69, 84          | 84, 69 | \{69,84\} | 69 \text{ and } 84 | x=84 \text{ or } x=69
x = 1, y = 2    | (1, 2) | y = 2, x = 1
\frac{1\pm\sqrt5}{2} | \frac{1-\sqrt5}{2}, \frac{1+\sqrt5}{2}
(1,8), (2,7)    | (2,7),(1,8) | (2, 7) \text{ and } (1, 8)
(3, \pi/2)      | \left( 3, \frac{\pi}{2} \right)
(3,4]           | 3 < x \le 4 | x \in (3,4]
x \ge \sqrt7    | [\sqrt7, \infty)
(-\infty,2)\cup(2,\infty) | \mathbb{R} \setminus \{2\}
\begin{pmatrix} -1/3 \\ 2 \end{pmatrix} | \begin{bmatrix} -\frac{1}{3} \\ 2 \end{bmatrix}
\mathbb{Z}/2\mathbb{Z} | \mathbb Z_2
\text{(C)}      | C | \text{(C) } 12 | \mathrm{C}
Yes             | \text{yes}
No solution     | \text{no solution}
\text{does not exist} | \text{Does not exist}
5               | \boldsymbol{5} | 5\text{ min} | 5 min | t = 5\text{ sec} | \overline{AB} = 5
5               | 5\text{ kWh} | 5 \text{ mL} | 5^\circ C
45\text{ min}   | 45 \text{ minutes}
27              | \textbf{(B)}\ 27 | 27 | \text{Area} = 27 \text{ cm}^2
B               | \textbf{(B)}\ 12\pi | (B) \frac{1}{2} | B. 12
(A) 27          | A | 27 | \textbf{(A)}\ 27 | A. 27
A               | (A) \frac{1}{2}(a+b) | (A) 4(M+N)
5               | \text{5 minutes}
\frac{1}{2}\text{ min} | \frac12\text{ min} | \frac12 \text{ minute}
0,\pm1          | 1, 0, -1 | \pm 1, 0 | \{0,\pm 1\} | \{0,1,-1\}
\begin{pmatrix}1\\-2\end{pmatrix} | \left(\begin{array}{c}1\\-2\end{array}\right) | \begin{bmatrix}1 \\[4pt] -2\end{bmatrix}
\langle1,2,3\rangle | (1,2,3)
2 < x < 3       | x \in (2,3) | (2,3)
\text{Ann and Bob} | \text{Bob and Ann}
"""
# A line: a truth, and answers that differ from it. Most are public reports about math graders.
WRONG = r"""
5               | .5 | 5\mathrm{i} | 5\operatorname{Id} | x < 5 | x \neq 5 | 5 \text{ or } 6 | 5 \text{ million} | (5,5)
5               | \text{not } 5 | [0,10] | 5 \text{ pairs} | 5\mathrm{id}
100             | 99 \approx 100 | 100 \approx 100.4 | \frac{199}{2} \approx 100
0.3             | \frac{1}{3} \approx 0.3
\sqrt{2}        | \sqrt{2} \approx 1.5 | \sqrt{3} \approx 1.73
5               | 5 = 6 | 2x = 5 | x^2 = 5 | x=5, y=6 | 5 \text{ (6 is also possible)} | 5.001 
5               | 5 \text{ a.m.} | 5^\circ + 1 | -5 | \frac{1}{5}
5               | 5 \text{ plus } 1 | 5 \text{ minus } 3 | 5 \text{ modulo } 7 | 5 \text{ factorial} | 5 \text{ halves}
5               | 5 \text{ thirds} | 5 \text{ tenths} | 5 \text{ trillion} | 5 \text{ below zero} | 5 \text{ except } 0
5               | 5 \text{ and then } 1 | 5 \text{ and then } \frac{1}{2} | 5 \text{ plus } x
10              | 10 \text{ in base } 2
3               | 3 \text{ quarters}
5 \text{ cm}    | 5 \text{ m} | 6 \text{ cm}
\frac{52}{7}    | 5 2/7 | 5\frac{2}{7} | 7.4286
56              | 5 6 | 5 \; 6 | 5, 6
3, 100          | 3100 | 3 | (100, 3)
0.\overline{3}  | 0.3 | 0.\overline{6} | 0
20.39           | 20.4
1e-8            | 0
\pi             | 3.14 | 3.1416 | \frac{22}{7}
\frac1{2^{80}}  | \frac1{2^{81}} | 0
2^{1000}        | 2^{1000}+1
\sqrt{10^{40}+1} | 10^{20}
R-r             | 0 | r-R
\binom{N}{n}    | 1 | \binom{n}{N}
e               | E
I               | i
\Sigma          | \sigma
f'(x)           | f(x) | f''(x)
A^T             | A | A^{-1}
f^{-1}(x)       | \frac{1}{f(x)}
n!!             | n!
ABC             | BAC
AB - BA         | 0
u \times v      | v \times u
\gcd(m,n)       | 1 | \gcd(m,k)
\operatorname{lcm}(m,n) | mn
\sum_{k=1}^n a_k | \sum_{k=1}^n b_k
\prod_{k=1}^n k | \prod_{k=1}^n (k+1)
|x|             | x
\max(a,b)       | a
\tan 60^\circ   | \tan 60
n \text{ odd}   | n \text{ even} | n
0 \text{ for } n \text{ odd} | 0 \text{ for } n \text{ even}
x = 5           | y = 5 | 6
AB = BA         | AB = BA + 1 | BA
xy = yx         | xy = yx + 1 | 0 = 0
B^n = \begin{pmatrix} 1 & 2 \end{pmatrix} | B^n = \begin{pmatrix} 1 & 3 \end{pmatrix}
\frac{2}{3}\pi  | 1\frac{2}{3}\pi | 0.\overline{6}
e^{-200}        | e^{-201} | 0
3x-y+13=0       | 3x+4y+14=0
\frac{x^2}{4}+\frac{y^2}{3}=1 | \frac{x^2}{16}+\frac{y^2}{12}=1
x=1, y=2        | x=2, y=1 | (2,1) | 2, 1
2, 2, 3         | 2, 3, 3 | 2, 3
(3,2)           | (2,3) | (5,1) | \{3,2\} | [3,2)
\pm 21          | 21
x > 0           | x \ge 0 | y > 0 | 0
\infty          | -\infty | \frac10
1011_2          | 11 | 1011_3
S_3             | S | S_4
n \equiv 1 \pmod 4 | n \equiv 3 \pmod 4
Yes             | No
C               | D | c | (C) + 1 | \text{(D) } 12 | (C) 5, (B) 6 | C. 5 \text{ or } D. 6 | (C) 5, B, D
(A) 27          | B | 28 | (A) 28 | (B) 27
27              | \textbf{(B)}\ 28
-1,1            | -1 < x < 1 | x \in (-1,1)
-1 < x < 1      | -1,1 | x = -1 \text{ or } x = 1 | \{-1,1\}
(-2,5)          | x = -2 \text{ or } x = 5
5\text{ min}    | 5\text{ sec}
\text{east}     | \text{west}
\text{listen}   | \text{silent}
\frac{1}{2}     | \frac{ | \frac{1}{ | \sqrt | ^ | _ | \left( | }{ | \\\\ | = | <> | + | % | , | 1/0 | \begin{pmatrix} 1 & 2 \\
"""
RUN_AWAY = [
    *(r"9^{9^{9^{9}}}", r"10^{10^{10}}", r"1000000000!", r"\sum_{k=1}^{10000000} \frac{1}{k}"),
    "(" * 300 + "x" + ")" * 300,
]


def pairs(lines: str) -> list[tuple[str, str]]:
    """(truth, answer) of a table above; " | " separates, so that |x| stays."""
    cells = [[cell.strip() for cell in line.split(" | ")] for line in lines.strip().splitlines()]
    return [(truth, answer) for truth, *answers in cells for answer in answers]


def score(truth, response: str, **limits) -> dict:
    return compute_score("set", response, truth, {"index": 3}, **limits)


def boxed(answer: str) -> str:
    return f"Hence the answer is $\\boxed{{{answer}}}$."


def test_right_and_wrong_answers_from_many_threads():
    """verl calls from the threads of an executor, where math-verify's own time-outs fail."""
    jobs = [(*pair, 1) for pair in pairs(RIGHT)] + [(*pair, 0) for pair in pairs(WRONG)]
    jobs += [(truth, truth, 1) for truth in {truth for truth, *_ in jobs}]
    with ThreadPoolExecutor(16) as executor:
        results = list(executor.map(lambda job: score(job[0], boxed(job[1]), seconds=60.0), jobs))
    assert [job for job, result in zip(jobs, results, strict=True) if result["score"] != job[2]] == []
    assert not any(result["gave_up"] for result in results)


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        st.text(max_size=200),
        st.lists(
            st.sampled_from(
                [*"{}()^_9x!,=|'%.+-[] ", *re.findall(r"\\\w+", r"\frac\sqrt\text\pm\sum\int\log\boxed\in")]
            ),
            max_size=40,
        ).map("".join),
        st.integers(1, 10**6).map(lambda exponent: f"9^{{9^{{{exponent}}}}}"),
    )
)
def test_every_response_is_scored_in_bounded_time(answer):
    assert score(r"\sqrt{x}", f"\\boxed{{{answer}}}", seconds=1.0, processes=1)["score"] in (0, 1)


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
        (r"$$\boxed{\boxed{5}}$$", "5"),
        (r"\boxed{" + "{" * 19 + "x" + "}" * 19 + "}", "{" * 19 + "x" + "}" * 19),
        (r"the answer is 7", None),
        (r"\boxed{}", None),
        (r"\boxed{1} then \boxed{\frac{1}{2", None),
        (r"\boxed 5", None),
    ],
)
def test_the_last_box_is_the_answer(response, answer):
    assert last_boxed(response) == answer


def test_numbers_are_read_exactly():
    assert {number(plain(text)) for text in (r"-\frac{3}{4}", "-3/4", "-.75", r"-0.74\overline{9}")} == {
        Fraction(-3, 4)
    }
    assert {number(text) for text in ("1/0", "1,23", "x", "", ".", "-", "1 2", "1e9999")} == {None}


@pytest.mark.parametrize("answer", RUN_AWAY)
def test_run_away_expressions_are_given_up_in_time_and_the_next_answer_is_right(answer):
    limits = {"processes": 1, "seconds": 0.5, "megabytes": 512}
    score(r"\sqrt{8}", r"\boxed{2\sqrt{2}}", **limits)  # its process is there
    begun = time.monotonic()
    assert score(r"\sqrt{2}", f"\\boxed{{{answer}}}", **limits)["gave_up"]
    assert time.monotonic() - begun < 3
    assert score(r"\sqrt{8}", r"\boxed{2\sqrt{2}}", **limits)["score"] == 1


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
@pytest.mark.timeout(60)
def test_long_responses_take_no_time(response):
    result = score(r"\frac{1}{2}", response)
    assert result["score"] == 0 and len(result["pred"]) <= 2 * LONGEST_ANSWER


def test_equal_answers_share_one_vote():
    """verl's majority vote compares ``pred``: one half, three ways, outvotes two thirds, twice."""
    from verl.trainer.ppo.metric_utils import process_validation_metrics

    answers = [r"\frac{1}{2}", "0.5", r"\frac12", r"\frac{2}{3}", "2/3"]
    results = [score("0.5", f"\\boxed{{{answer}}}") for answer in answers]
    infos = {key: [result[key] for result in results] for key in results[0]}
    metrics = process_validation_metrics(["set"] * 5, ["one prompt"] * 5, infos)["set"]["acc"]
    assert metrics["mean@5"] == pytest.approx(0.6)
    # Drawn five of five with replacement, the majority is right more often than the mean answer.
    assert metrics["maj@5/mean"] > 0.64
    same = [r"2\sqrt2", r"2\sqrt{2}", r"$2 \sqrt {2}$", r"\displaystyle 2\sqrt{2}"]
    assert {score("1", f"\\boxed{{{answer}}}")["pred"] for answer in same} == {r"2\sqrt{2}"}
    assert plain("x^2") == plain("x^{2}") != plain("x^3")


def test_memory_is_bounded_and_a_process_that_is_killed_from_outside_is_replaced():
    before, pool = set(psutil.Process().children()), Graders(processes=1, seconds=5.0, megabytes=700)
    assert pool.equal(r"\sqrt{8}", r"2\sqrt{2}") is True
    (grader,) = set(psutil.Process().children()) - before
    assert grader.rlimit(psutil.RLIMIT_AS) == (700 << 20, 700 << 20)
    grader.kill()
    assert pool.equal(r"\sqrt{8}", r"2\sqrt{2}") is None
    assert pool.equal(r"\sqrt{8}", r"2\sqrt{2}") is True


def test_an_interrupted_call_leaves_no_answer_for_the_next_one():
    pool = Graders(processes=1, seconds=5.0)
    assert pool.equal(r"\sqrt{8}", r"2\sqrt{2}") is True
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(KeyboardInterrupt):
        pool.equal(r"\sqrt{2}", "1000000000!")
    signal.signal(signal.SIGALRM, before)
    assert pool.equal(r"\sqrt{8}", r"2\sqrt{2}") is True


def test_no_process_outlives_a_killed_reward_worker():
    """Also while one of them is busy with a run-away expression."""
    program = (
        "import threading, time\n"
        "from recipe.asyppo.reward.math_reward import compute_score\n"
        "limits = dict(processes=2, seconds=2.0)\n"
        "compute_score('', r'\\boxed{y}', 'x', **limits)\n"
        "threading.Thread(target=compute_score, args=('', r'\\boxed{1000000000!}', r'\\sqrt{2}'), kwargs=limits).start()\n"
        "time.sleep(1.5)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    worker = psutil.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline() == "ready\n"
    family = worker.children(recursive=True)
    assert len(family) == 1
    worker.kill()
    worker.wait()
    _, alive = psutil.wait_procs(family, timeout=6)
    assert alive == []


def test_without_math_verify_it_cannot_be_imported():
    """verl counts a call that raises as a failed response and trains on, so nothing may wait for the first such call."""
    code = "import sys; sys.modules['math_verify'] = None; import recipe.asyppo.reward.math_reward"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and "ImportError: recipe.asyppo.reward.math_reward needs math-verify" in run.stderr
    assert "pip install 'verl[math]==0.9.1'" in run.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seconds": 0}, "reward_kwargs.seconds=0"),
        ({"seconds": "2"}, "reward_kwargs.seconds='2'"),
        ({"megabytes": 0.5}, "reward_kwargs.megabytes=0.5"),
        ({"processes": True}, "reward_kwargs.processes=True"),
        ({"second": 2}, "reward_kwargs.second=2: give processes, seconds, megabytes above 0"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        score("5", "no box", **options)


def test_truths_of_every_type():
    """Numbers are read; what is neither text nor a number is refused with its row, right or wrong answer alike."""
    assert score(5, r"\boxed{5}")["score"] == score(np.float64(0.5), r"\boxed{\frac12}")["score"] == 1
    for truth in (None, ["5"], {"a": 5}, float("nan"), " "):
        with pytest.raises(ValueError, match=r"ground_truth=.* in row 3 of set must be text or a number"):
            score(truth, "no box")


def test_a_process_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="pip install"):
        Graders(processes=1).equal("x", "y")


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
    right = reward(data_source="s", solution_str=r"\boxed{\sqrt{8}}", ground_truth=r"2\sqrt{2}", extra_info={})
    endless = reward(data_source="s", solution_str=r"\boxed{1000000000!}", ground_truth=r"\sqrt{2}", extra_info={})
    assert right["score"] == 1 and endless["gave_up"] == 1


def graders() -> list[psutil.Process]:
    """The grading processes below this one that run."""
    alive = [it for it in psutil.Process().children(recursive=True) if it.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if "reward.grader" in " ".join(child.cmdline())]


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
    pairs = [(r"\sqrt{8}", r"2\sqrt{2}"), ("5", "6"), ("5", "x=5"), (r"\sqrt{2}", r"1000000000!")]
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
    ray.init(address="local", num_cpus=2, runtime_env={"env_vars": {"VERL_PLATFORM": "cpu"}})
    try:
        manager = RewardLoopManager(config)  # its workers end with it
        scored = manager.compute_rm_score(batch)
        started = set(graders()) - before
    finally:
        ray.shutdown()
    assert scored.batch["rm_scores"].sum(-1).tolist() == [1, 0, 1, 0]
    assert scored.non_tensor_batch["gave_up"].tolist() == [0, 0, 0, 1]
    assert started and psutil.wait_procs(started, timeout=10)[1] == []

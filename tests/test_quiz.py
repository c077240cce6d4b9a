"""The quiz: dialogues as they are read, and as verl's agent loop leads them."""

import pytest
import torch
from test_recipe import environment, recorded, validated
from training import run_script
from transformers import AutoTokenizer

from recipe.asyppo.toy.make_quiz import QUIZ, build_tokenizer, dialogues, make


@pytest.fixture(scope="module")
def quiz(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quiz") / "task"
    make(folder, steps=2)
    return folder


def test_a_dialogue_asks_every_symbol_and_marks_every_answer():
    torch.manual_seed(0)
    tokenizer, symbols = build_tokenizer(QUIZ), QUIZ.draw_prompts(8, torch.Generator().manual_seed(0))
    right = tokenizer.batch_decode(QUIZ.right_tokens(symbols))
    prompts, responses = map(tokenizer.batch_decode, dialogues(QUIZ, symbols))
    marks = set()
    for prompt, response, truth in zip(prompts, responses, right, strict=True):
        *questions, first = prompt.split()
        words, truths = response.split(), truth.split()
        assert first == questions[0] and words[2::3] == questions[1:] and len(questions) == 16 == len(words[::3])
        verdicts = ["right" if given == wanted else "wrong" for given, wanted in zip(words[::3], truths, strict=True)]
        assert words[1::3] == verdicts[:-1]
        marks |= set(verdicts)
    assert marks == {"right", "wrong"}


def test_the_tokenizer_is_read_back_as_it_was_written(quiz):
    read = AutoTokenizer.from_pretrained(quiz / "actor")
    assert read("s3 7 wrong").input_ids == build_tokenizer(QUIZ)("s3 7 wrong").input_ids and len(read.encode("\n")) == 1


@pytest.mark.parametrize("algorithm", ["asyppo", "paper", "grpo"])
def test_what_the_algorithms_set(root, toy, quiz, tmp_path, algorithm):
    variables = environment(root, toy, TOY_DIR=str(quiz), ALGO=algorithm)
    config = validated(recorded(root / "scripts/run_quiz_cpu.sh", tmp_path, variables))
    assert config.algorithm.adv_estimator == ("grpo" if algorithm == "grpo" else "asyppo")
    assert config.algorithm.lam == {"asyppo": 0, "paper": 0.95, "grpo": 1.0}[algorithm]
    assert config.data.max_prompt_length == 17 and config.actor_rollout_ref.rollout.agent.default_agent_loop == "quiz"


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_the_environment_asks_marks_and_is_not_trained(root, quiz, tmp_path):
    """Two steps of the script with the paper's masks: 64 responses of 16 answers and 30 tokens of the environment."""
    script, overrides = root / "scripts/run_quiz_cpu.sh", ["trainer.total_training_steps=2", "trainer.save_freq=-1"]
    steps, _ = run_script(script, quiz, tmp_path / "run", *overrides, ALGO="paper")
    assert len(steps) == 2
    for step in steps:
        assert step["response_length/mean"] == step["response_length/min"] == 46
        assert step["asyppo/adv_masked_fraction"] == pytest.approx(204 / 1024)
        assert step["training/rollout_probs_diff_max"] < 1e-4
        assert all(step[f"asyppo/critic_{m}/grad_norm"] > 0 for m in range(2)) and step["actor/grad_norm"] > 0
        # One of 16 answers in 64 responses is right by chance in ten, and the actor has learned nothing.
        assert 0 < step["critic/score/mean"] < 0.3 and (16 * step["critic/score/max"]).is_integer()

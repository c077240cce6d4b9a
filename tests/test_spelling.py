"""The demo's task: what its actor reads, what its critics learn from, and that a run gets the critics as they were made."""

import shutil
from dataclasses import replace

import pytest
import torch
from test_recipe import environment, recorded, validated
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from asyppo_verl.critic_settings import read_config
from recipe.asyppo.toy import make_spelling
from recipe.asyppo.toy.make_spelling import LONGEST, PROMPT, Settings, Spelling, main, make, sample
from recipe.asyppo.toy.make_toy import all_or_nothing, build_tokenizer
from recipe.asyppo.toy.toy_reward import compute_score

SMALL = Settings(actor_steps=2, answers=64, passes=1)


@pytest.fixture(scope="module")
def spelling(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spelling") / "task"
    make(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def task():
    return Spelling(build_tokenizer())


def test_the_problems(task):
    prompt, answer = task.pairs[407]
    assert (prompt, answer) == ("407=", "four zero seven") and len(task.pairs) == 1000
    decoded = build_tokenizer().decode(task.answers[407], skip_special_tokens=True)
    assert compute_score("toy_spelling", decoded, answer)["score"] == 1
    assert int(task.is_response(task.answers[[407]]).sum()) == len(answer) + 1
    assert max(len(answer) for _, answer in task.pairs) < LONGEST


def test_typos_are_letters_in_the_careless_share_of_answers(task):
    torch.manual_seed(0)
    rows = torch.arange(1000)
    answers = task.answers[rows]
    assert torch.equal(task.typed(rows, 0.0, 1.0), answers) and torch.equal(task.typed(rows, 1.0, 0.0), answers)
    is_typo = (typed := task.typed(rows, 0.5, 0.3)) != answers
    assert 0.44 < float(is_typo.any(1).float().mean()) < 0.56
    is_letter = answers != task.end
    # Of 0.5 x 0.3 letters drawn anew one in 26 is right by chance.
    assert float(is_typo[is_letter].float().mean()) == pytest.approx(0.15 * 25 / 26, abs=0.01)
    assert not is_typo[~is_letter].any() and torch.isin(typed[is_typo], task.letters).all()


def test_answers_are_drawn_from_the_actor(task, spelling):
    """Greedy in effect: with its logits scaled up, what is sampled is what a pass over the whole text finds likeliest."""
    actor = AutoModelForCausalLM.from_pretrained(spelling / "actor")
    actor.lm_head.weight.data *= 1e4
    rows = torch.arange(0, 1000, 50)
    answers = sample(actor, task, rows)
    with torch.no_grad():
        likeliest = actor(torch.cat([task.prompts[rows], answers[:, :-1]], 1)).logits[:, 3:].argmax(-1)
    is_response = task.is_response(answers)
    assert answers.shape == (20, LONGEST) and torch.equal(answers[is_response], likeliest[is_response])
    assert (answers[~is_response] == task.end).all()


def test_each_critic_is_a_value_model_with_a_head_of_its_own(spelling):
    heads = []
    for name in ("critic", "critic_1"):
        critic, found = AutoModelForTokenClassification.from_pretrained(spelling / name, output_loading_info=True)
        assert not found["missing_keys"] and not found["unexpected_keys"] and critic.score.out_features == 1
        heads.append(critic.score.weight)
    assert not torch.equal(*heads)


def test_critics_learn_what_answers_are_worth(task, spelling, tmp_path, monkeypatch):
    """Of answers right and wrong in turns; the value of the last token, which has all before it in view."""
    shutil.copytree(spelling / "actor", tmp_path / "actor")

    def in_turns(_actor, task, rows):
        return task.typed(rows, 1.0, 0.6).where(torch.arange(len(rows))[:, None] % 2 == 1, task.answers[rows])

    monkeypatch.setattr(make_spelling, "sample", in_turns)
    make_spelling.make_critic(tmp_path, 0, Settings(answers=1024, passes=2))
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic")
    rows = torch.arange(0, 1000, 20)
    values = []
    for given in (task.answers[rows], task.typed(rows, 1.0, 0.6)):
        last = task.is_response(given).sum(1) - 1
        with torch.no_grad():
            found = critic(torch.cat([task.prompts[rows], given[:, :-1]], 1)).logits[:, PROMPT - 1 :, 0]
        values.append(float(found[torch.arange(len(rows)), last].mean()))
    right, wrong = values
    assert right - wrong > 0.5


def test_critics_without_graded_answers_are_language_models_that_have_read_the_text(task, tmp_path):
    losses = []
    for steps in (2, 40):
        folder = tmp_path / str(steps)
        make(folder, replace(SMALL, answers=0, critic_steps=steps))
        critics = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("critic", "critic_1")]
        assert all(critic.config.architectures == ["Qwen3ForCausalLM"] for critic in critics)
        assert not torch.equal(*(critic.get_input_embeddings().weight for critic in critics))
        text = torch.cat([task.prompts, task.answers], 1)
        losses.append([float(critic(text, labels=text).loss.detach()) for critic in critics])
    assert max(losses[1]) < 0.9 * min(losses[0])


def test_another_number_of_answers_is_not_taken_for_that_of_the_folder(spelling, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["make_spelling", str(spelling), "--answers", "0"])
    with pytest.raises(SystemExit):
        main()
    assert "have seen 64 answers, not --answers 0" in capsys.readouterr().err


def test_the_script_gives_every_critic_its_folder(root, toy, spelling, tmp_path):
    script = root / "scripts/run_asyppo_cpu.sh"

    def overrides(folder, *more):
        lines = recorded(script, tmp_path, {**environment(root, toy), "TOY_DIR": str(folder)}, *more)
        return lines, validated(lines)

    lines, config = overrides(spelling)
    assert config.critic.model.path == f"{spelling}/critic"
    assert read_config(config).critic_overrides == {1: {"model": {"path": f"{spelling}/critic_1"}}}
    for folder, more in ((spelling, ["+asyppo.num_critics=1"]), (toy, [])):
        lines, _ = overrides(folder, *more)
        assert not any("critic_overrides" in line for line in lines)


def test_a_folder_that_is_no_task_is_not_replaced_by_one(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(SystemExit, match="mine holds something else than a task"), all_or_nothing(tmp_path / "mine"):
        pass
    (tmp_path / "mine/thesis.txt").rename(tmp_path / "mine/made.json")
    with all_or_nothing(tmp_path / "mine") as partial:
        (partial / "made.json").write_text("{}")
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["{}"]

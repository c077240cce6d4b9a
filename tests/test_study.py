"""The study: its credit is the one page's, its oracle the truth, and its rows resume."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from verl.trainer.ppo.core_algos import compute_gae_advantage_return

from asyppo_verl import asyppo
from asyppo_verl.adaptive_lam import AdaptiveLam
from recipe.asyppo import one_page
from recipe.asyppo.study import __main__ as command
from recipe.asyppo.study import engine, report, rows, tasks
from recipe.asyppo.study.credit import Run, credit, gae, keep, mask_score
from recipe.asyppo.study.rows import Seeds, Store
from recipe.asyppo.study.tasks import Task

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TINY = {"symbols": 12, "answers": 3, "actor_size": (16, 1), "supervised_steps": 3, "demonstrations": 16}


def holes(runs: int, responses: int, length: int) -> torch.Tensor:
    """Response tokens (R, B, T) of random lengths, at least one each."""
    return torch.arange(length) < torch.randint(1, length + 1, (runs, responses, 1))


def last_of(is_response: torch.Tensor) -> torch.Tensor:
    """The last response token of every row, where its reward is."""
    return is_response & (is_response.flip(-1).cumsum(-1).flip(-1) == 1)


@pytest.mark.parametrize("critics", [0, 1, 2, 4])
def test_the_credit_of_many_runs_is_that_of_the_one_page(critics):
    torch.manual_seed(critics)
    is_response = holes(3, 8, 5)
    rewards = torch.rand(3, 8, 5) * last_of(is_response)
    values = torch.rand(critics, 3, 8, 5)
    runs = [
        Run(
            num_critics=critics,
            responses=4,
            lam=lam,
            critic_lam=critic_lam,
            adv_mask_fraction=k,
            entropy_filter_fraction=h,
        )
        for lam, critic_lam, k, h in ((0.0, 0.5, 0.2, 0.4), (0.9, 1.0, 0.4, 0.2), (1.0, 0.9, 0.0, 0.0))
    ]
    *ours, metrics = credit(runs, rewards, values, rewards, is_response)
    for r, run in enumerate(runs):
        *theirs, page = one_page.credit(run, rewards[r], values[:, r], is_response[r])
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine[r] * is_response[r], other * is_response[r], **CLOSE)
        if critics and run.critic_lam == 1:  # its returns are the reward
            assert metrics["explained_var"][r] == pytest.approx(page["asyppo/explained_var"], rel=1e-3)
        if critics > 1 and run.adv_mask_fraction:
            ratio = page["asyppo/adv_abs_masked"] / page["asyppo/adv_abs_kept"]
            assert metrics["masked_to_kept"][r] == pytest.approx(ratio, rel=1e-4)


def test_the_signals_by_which_advantages_are_masked():
    torch.manual_seed(0)
    sigma, surprisal = torch.rand(5, 4, 3), torch.rand(5, 4, 3)
    found = mask_score(
        [Run(mask_by=by) for by in ("sigma", "highest", "surprisal", "relative", "random")], sigma, surprisal
    )
    for score, expected in zip(found, (sigma[0], -sigma[1], surprisal[2], sigma[3] / sigma[3].mean(0)), strict=False):
        assert torch.equal(score, expected)
    assert not torch.equal(found[4], sigma[4])
    runs = [Run(num_critics=2, responses=4, mask_from=0.2)] * 2
    is_response = torch.ones(2, 4, 3, dtype=torch.bool)
    *_, kept, metrics = credit(
        runs, torch.rand(2, 4, 3), torch.rand(2, 2, 4, 3), surprisal[:2], is_response, None, [0.19, 0.2]
    )
    assert kept[0].all() and not kept[1].all()
    assert metrics["masked_to_kept"][0] == 0 < metrics["masked_to_kept"][1]


@pytest.mark.parametrize("largest", [False, True])
def test_the_selection_of_many_runs_is_the_methods(largest):
    torch.manual_seed(0)
    fractions = [0.0, 0.2, 0.29, 0.5, 0.2]
    score, is_response = torch.randint(4, (5, 20, 5)).float(), holes(5, 20, 5)  # ties everywhere
    score[4] = 0  # no signal
    ours = keep(score, is_response, fractions, largest=largest)
    theirs = asyppo.keep_entropy if largest else asyppo.keep_advantage
    for r, fraction in enumerate(fractions):
        assert torch.equal(ours[r], theirs(score[r], is_response[r], fraction=fraction))


@pytest.mark.parametrize("remarks", ["none", "own"])
@pytest.mark.parametrize("is_exact", [False, True])
def test_the_oracles_values_are_the_mean_of_many_continuations(remarks, is_exact):
    """From every prefix of one response, 4,000 continuations, graded as the task does."""
    torch.manual_seed(0)
    task = Task("", remarks=remarks, is_exact=is_exact, **TINY)
    prompts = task.draw_prompts(1, torch.Generator().manual_seed(1)).expand(4000, -1)
    right, wrong, _ = (x[prompts - tasks.FIRST_SYMBOL] for x in task.table())
    chance, is_right = torch.tensor([0.9, 0.5, 0.7]), torch.tensor([True, True, False])
    values = tasks.oracle_values(task, is_right[None, None], chance[None, None])[0, 0]
    for t in range(task.response_length):
        answered = (t + task.stride - 1) // task.stride
        drawn = torch.rand(4000, task.answers) < chance
        drawn[:, :answered] = is_right[:answered]
        response = torch.where(drawn, right, wrong).repeat_interleave(task.stride, 1)
        _, rewards = task.grade(torch.cat([prompts, response], 1)[None])
        assert float(values[t]) == pytest.approx(float(rewards.mean()), abs=0.03)


@pytest.mark.parametrize(("update_first", "adaptive_lam"), [(False, False), (True, False), (False, True), (True, True)])
def test_critics_learn_before_or_after_they_value_a_step(update_first, adaptive_lam):
    """As many updates, towards the returns of the values before them; credit from the values that are due."""
    torch.manual_seed(0)
    task = Task("", remarks="observed", **TINY)
    options = {"critic_lam": 0.5, "update_first": update_first, "adaptive_lam": adaptive_lam}
    runs = [Run(prompts=4, responses=4, mini_batches=1, seed=seed, **options) for seed in range(2)]
    trainer = engine.Trainer(task, runs, partial(tasks.starting_model, task))
    (critics,) = trainer.critics
    if adaptive_lam:
        assert [lam.lam for lam in critics.adaptive_lams] == [runs[0].lam] * 2
        critics.adaptive_lams = [AdaptiveLam(0.6), lambda explained: 0.1]
    batch, metrics = trainer.rollout()
    tokens, is_response = batch["tokens"], batch["is_response"]
    assert critics.models.steps == (3 if update_first else 0)
    rewards = torch.where(last_of(is_response), task.grade(tokens)[1][..., None], 0.0)
    before = critics.old_values_SBT.unflatten(0, (2, 2))
    with torch.no_grad():
        due = critics.values(tokens).unflatten(0, (2, 2))
    assert torch.equal(before, due) is not update_first
    _, returns, _, seen = credit(runs, rewards, before, -batch["old"], is_response)
    torch.testing.assert_close(batch["returns"], returns)
    lams = [AdaptiveLam(0.6)(seen["explained_var"][0]), 0.1] if adaptive_lam else None
    torch.testing.assert_close(batch["advantages"], credit(runs, rewards, due, -batch["old"], is_response, lams)[0])
    assert [run["explained_var"] for run in metrics] == pytest.approx(seen["explained_var"])
    trainer.step()
    assert critics.models.steps == (6 if update_first else 3)


def test_observations_are_passed_over_as_in_verl():
    """Advantages and returns of three runs, of responses with holes, against verl's own."""
    torch.manual_seed(0)
    is_response = (torch.rand(3, 8, 6) < 0.6) | (torch.arange(6) == 5)
    rewards, values = torch.rand(3, 8, 6) * is_response, torch.rand(3, 8, 6)
    advantages, returns = gae(rewards, values, is_response, torch.tensor([0.0, 0.9, 1.0]))
    for r, lam in enumerate([0.0, 0.9, 1.0]):
        theirs = compute_gae_advantage_return(rewards[r], values[r], is_response[r].float(), gamma=1.0, lam=lam)
        for mine, other in zip((advantages[r], returns[r]), theirs, strict=True):
            torch.testing.assert_close(mine * is_response[r], other * is_response[r], **CLOSE)


def test_the_environment_writes_true_remarks_that_are_no_response():
    task = Task("", remarks="observed", **TINY)
    actor = tasks.starting_model(task, task.actor_size)
    with torch.no_grad():
        tokens, _, is_response = tasks.sample(task, actor, task.draw_prompts(64, torch.Generator())[None])
    is_right, _ = task.grade(tokens)
    is_counted = is_response[..., ::2]
    assert is_response[..., ::2].any() and not is_response[..., 1::2].any()
    said = tokens[..., task.answers + 1 :: 2] == tasks.RIGHT
    assert torch.equal(said[is_counted], is_right[is_counted]) and 0 < is_right.float().mean() < 1


def test_the_chances_are_the_shares_of_right_answers():
    """Of 4,000 responses to one prompt, sampled by the actor; every one is told the same chances."""
    task = Task("", **TINY)
    actor = tasks.starting_model(task, task.actor_size)
    prompts = task.draw_prompts(1, torch.Generator().manual_seed(1)).expand(1, 4000, -1)
    with torch.no_grad():
        tokens, _, is_response = one_page.sample(actor, prompts, task.response_length)
        chance = tasks.chances(task, actor, tokens, 4000)
    shares = task.grade(tokens)[0][0][is_response[0].all(-1)].float().mean(0)
    assert torch.equal(chance[0, 0], chance[0, -1])
    torch.testing.assert_close(chance[0, 0], shares, rtol=0, atol=0.03)


def test_a_fresh_table_has_demonstrations_and_a_start_of_its_own(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "plain", Task("plain", **TINY))
    first, same, fresh = (tasks.named(name) for name in ("plain", "plain@0", "plain@7"))
    for a, b, c in zip(*(task.table() for task in (first, same, fresh)), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    a, b, c = (tasks.starting_model(task, task.actor_size).weights["head"] for task in (first, same, fresh))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert first.table_seed == 0 and fresh == replace(first, name="plain@7", table_seed=7)


def test_the_grade_and_the_demonstrations_agree():
    task = Task("", remarks="own", **TINY, chance=(1.0, 1.0))
    prompts = task.draw_prompts(6, torch.Generator().manual_seed(0))
    responses = task.demonstrate(prompts)
    is_right, rewards = task.grade(torch.cat([prompts, responses], 1)[None])
    assert is_right.all() and (rewards == 1).all() and (responses[:, 1::2] == tasks.RIGHT).all()
    responses[0, 2] = task.table()[1][prompts[0, 1] - tasks.FIRST_SYMBOL]
    is_right, rewards = task.grade(torch.cat([prompts, responses], 1)[None])
    assert is_right[0, 0].tolist() == [True, False, True] and float(rewards[0, 0]) == pytest.approx(2 / 3)
    tokens = torch.cat([prompts, responses], 1)[None]
    assert task.admitted(tokens, is_right).item() == 0  # the one wrong answer is called right
    tokens[0, 0, task.answers + 3] = tasks.WRONG
    assert task.admitted(tokens, is_right).item() == 1
    assert float(replace(task, is_exact=True).grade(torch.cat([prompts, responses], 1)[None])[1][0, 0]) == 0


def test_runs_with_unlike_critics_train_side_by_side():
    """One learns while the other's critics are pre-trained: its actor rests."""
    task = Task("", remarks="observed", **TINY)
    start = partial(tasks.starting_model, task)
    small = {"prompts": 2, "mini_batches": 1, "actor_lr": 1e-2}
    both = [Run(num_critics=0, **small), Run(num_critics=2, critic_size=(16, 1), critic_warmup=9, seed=1, **small)]
    history = engine.train(task, both, start, steps=3)
    assert "explained_var" in history[0][1] and "explained_var" not in history[0][0] and len(history) == 3
    trainer = engine.Trainer(task, both, start)
    before = {name: weight.clone() for name, weight in trainer.actors.weights.items()}
    trainer.step()
    for name, weight in trainer.actors.weights.items():
        assert torch.equal(weight[1], before[name][1])  # value pre-training: the actor rests
        assert not torch.equal(weight[0], before[name][0])


def test_an_update_is_of_the_credit_that_was_given(monkeypatch):
    """What the actor's loss gets: the batch's advantages in another order, and a bonus for kept tokens' entropy."""
    torch.manual_seed(0)
    task, given, made = Task("", remarks="observed", **TINY), [], []
    run = Run(num_critics=2, prompts=2, responses=4, mini_batches=1, epochs=1, entropy_coeff=0.5)
    trainer = engine.Trainer(task, [run], partial(tasks.starting_model, task))
    loss, rollout = one_page.actor_loss, trainer.rollout
    monkeypatch.setattr(one_page, "actor_loss", lambda *values: given.append(values) or loss(*values))
    monkeypatch.setattr(trainer, "rollout", lambda: made.append(rollout()) or made[0])
    trainer.step()
    ((log_prob, bonus, old, advantages, is_response),), ((batch, _),) = given, made
    order = (old[0, :, None] == batch["old"][0]).all(-1).long().argmax(1)
    torch.testing.assert_close(log_prob[is_response], old[is_response], rtol=1e-3, atol=1e-4)
    assert torch.equal(advantages, batch["advantages"][:, order])
    assert torch.equal(is_response, batch["is_response"][:, order])
    assert (bonus >= 0).all() and bonus.any() and not bonus[~batch["keep_entropy"][:, order]].any()


def test_free_steps_come_before_the_first():
    task, seen, step = Task("", remarks="observed", **TINY), [], engine.Trainer.step
    run = Run(num_critics=2, prompts=2, responses=4, mini_batches=1, free_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Trainer, "step", lambda self: seen.append(self.steps) or step(self))
        engine.train(task, [run], partial(tasks.starting_model, task), steps=1)
    assert seen == [-2, -1, 0]


def test_equal_data_for_each_critic():
    runs = [Run(num_critics=2, shard=shard, prompts=2, responses=4) for shard in ("group", "prompt", "none", "half")]
    own = engine.owners(runs)[..., 0].view(2, 4, 8).sum(-1)  # responses of each critic
    assert own[:, 0].tolist() == [4, 4] and own[:, 2].tolist() == [8, 8] and own[:, 3].tolist() == [4, 4]


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The command on a tiny task and grid, and the folder of its runs."""
    monkeypatch.setattr(tasks, "TASKS", {"plain": Task("plain", actor_lrs=(1e-3, 2e-3), **TINY)})
    monkeypatch.setattr(rows, "TASKS", tasks.TASKS)
    monkeypatch.setattr(report, "TASKS", tasks.TASKS)
    for name, algorithm in rows.ALGORITHMS.items():
        small = replace(algorithm, prompts=2, responses=4, mini_batches=1, critic_size=(16, 1 + (name == "ppo")))
        monkeypatch.setitem(rows.ALGORITHMS, name, small)
    monkeypatch.setattr(rows, "CRITIC_LRS", (1e-3,))

    def run(*arguments: str) -> list[dict]:
        seeds = ["--seeds=2", "--tuning-seeds=1", "--fresh-seeds=2"]
        folders = [f"--folder={tmp_path}", f"--out={tmp_path}"]
        command.main([*arguments, *seeds, *folders, "--steps=2", "--device=cpu"])
        path = tmp_path / "runs.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return run, tmp_path


def test_rows_resume_and_report(study, capsys):
    run, folder = study
    assert run("fitness-plain", "--seconds=0") == []
    fitness = run("fitness-plain", "--stack=4")  # three algorithms: two learning rates on one seed, the best on two
    assert len(fitness) == 3 * (2 * 1 + 2) and all(len(line["curve"]) == 2 for line in fitness)
    assert run("fitness-plain") == fitness
    main = run("main-plain", "masks-plain")
    assert main[: len(fitness)] == fitness
    assert len({line["key"] for line in main}) == len(main) == len(fitness) + 3 * (1 + 2) + 4 * 2
    names = [json.loads(line["key"])[0] for line in run("fresh-plain")[len(main) :]]
    assert names == ["plain@200"] * 6 + ["plain@201"] * 6
    run("--list")
    assert "masks-plain        11 of 11 runs" in capsys.readouterr().out
    run("report")
    text = (folder / "tables.md").read_text()
    assert all((folder / name).stat().st_size > 0 for name in ("curves.png", "fresh.png"))
    assert (
        "| asyppo | " in text
        and "| mask alone | " in text
        and "| critics first, lam=0 | " in text
        and "shares but for k=0.2 h=0.2, k=0.0 h=0.0" in text
    )
    run("report")
    assert (folder / "tables.md").read_text() == text
    with pytest.raises(SystemExit, match="is none of"):
        run("fitness-unknown")


def test_intervals_and_the_choice_of_settings(tmp_path):
    """Mean 2, deviation 1, three numbers: half a width of 4.303 / sqrt(3). The best setting is that of the tuning seeds."""
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5)
    store, seeds = Store(tmp_path, steps=1), Seeds(main=(0,), tuning=(100,))
    for index, run in enumerate(rows.grid("plain", "grpo")):
        store.add("plain", replace(run, seed=100), [index == 2])
        store.add("plain", replace(run, seed=0), [index == 4])
    assert rows.best(Store(tmp_path, steps=1), "plain", "grpo", seeds).actor_lr == tasks.TASKS["plain"].actor_lrs[2]
    assert rows.best(store, "plain", "ppo", seeds) is None


def test_a_run_that_was_stopped_early_takes_nothing_from_a_longer_one(tmp_path):
    store, run = Store(tmp_path, steps=2), Run(num_critics=0)
    store.add("plain", run, [0.5, 0.5])
    store.add("plain", run, [0.1])
    assert store.score("plain", run) == Store(tmp_path, steps=2).score("plain", run) == 0.5

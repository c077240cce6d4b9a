"""A report says what the runs' logs say, in a real browser, and nothing of a run is ever taken for HTML or a script."""

import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import yaml
from matplotlib import image

from recipe.asyppo.report import curves, pictures, ranges, runs, verdict
from recipe.asyppo.report.__main__ import main
from recipe.asyppo.report.tokens import kept

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\u2028\u202e&lt;"


def write_run(folder: Path, *, steps: int = 24, seed: int = 1, settings: dict | None = None, **changed) -> Path:
    """A run in which every metric is healthy, but for those given as a function of the step."""
    config = {"data": {"seed": seed}, "asyppo": {"adv_mask_fraction": 0.2}, "trainer": {"experiment_name": folder.name}}
    (folder / "hydra/.hydra").mkdir(parents=True)
    (folder / "hydra/.hydra/config.yaml").write_text(yaml.safe_dump(config | (settings or {})))
    healthy = {
        "critic/score/mean": lambda step: 0.4 + 0.01 * step + 0.001 * seed,
        "asyppo/explained_var": lambda step: 0.02 * step,
        "asyppo/sigma/p50": lambda step: 0.1,
        "asyppo/sigma/p90": lambda step: 0.3,
        "asyppo/critic_0/vf_loss": lambda step: 1 / step,
        "asyppo/critic_1/vf_loss": lambda step: 1.1 / step,
        "asyppo/adv_masked_fraction": lambda step: 0.1999,
        "asyppo/adv_abs_kept": lambda step: 0.8,
        "asyppo/adv_abs_masked": lambda step: 0.5,
        "actor/entropy": lambda step: 1.0,
        "timing_s/step": lambda step: 60.0 + seed,
    }
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            data = {key: value(step) for key, value in (healthy | changed).items()}
            file.write(json.dumps({"step": step, "data": data}) + "\n")
    return folder


@pytest.fixture(scope="module")
def browser():
    """A real Chromium; the page may ask for nothing beyond itself."""
    with pictures.chromium() as browser:
        yield browser


@pytest.fixture
def opened(browser):
    """Opens a page; at the end it must have logged nothing, asked for nothing else, and run no script of others."""
    pages, complaints, asked = [], [], []

    def opened(file: Path, width: int = 1200, scheme: str = "light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{file}")
        pages.append((page, file))
        return page

    yield opened
    assert not complaints
    assert asked == [file.resolve().as_uri() for _, file in pages]
    assert all(page.evaluate("window.hacked") is None for page, _ in pages)
    for page, _ in pages:
        page.close()


# -- runs --------------------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_nothing_but_seeds_are_one_band(tmp_path):
    one, two = (runs.load(write_run(tmp_path / f"s{seed}", seed=seed)) for seed in (1, 2))
    other = runs.load(write_run(tmp_path / "other", settings={"asyppo": {"adv_mask_fraction": 0.1}}))
    assert runs.bands([one, other, two]) == [[one, two], [other]]
    assert runs.differences([one, other, two]) == [
        ("asyppo.adv_mask_fraction", ["0.2", "0.1", "0.2"]),
        ("data.seed", ["1", "1", "2"]),
    ]
    unknown = tmp_path / "file_logger.jsonl"
    shutil.copy(tmp_path / "s1/metrics.jsonl", unknown)
    alone = runs.load(unknown)
    assert alone.name == "file_logger" and alone.settings is None
    assert runs.bands([one, alone, two]) == [[one, two], [alone]]
    assert runs.differences([one, alone, two]) == [("data.seed", ["1", "unknown", "2"])]


def test_a_resumed_run_has_its_earlier_steps_and_a_cut_line_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", steps=6)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.history.jsonl").write_text("".join(lines[:4]))
    data = {"critic/score/mean": 9.0, "asyppo/explained_var": None, "text": "x", "table": [1]}
    again = json.dumps({"step": 4, "data": data}) + "\n"
    (folder / "metrics.jsonl").write_text(again + lines[4] + lines[5][:20])
    run = runs.load(folder)
    assert run.steps == [1, 2, 3, 4, 5]
    assert run.metrics["critic/score/mean"] == pytest.approx([0.411, 0.421, 0.431, 9.0, 0.451])
    assert run.not_finite == {"asyppo/explained_var": [4]} and not {"text", "table"} & run.metrics.keys()
    (folder / "metrics.jsonl").unlink()
    assert runs.load(folder).steps == [1, 2, 3, 4]  # no new step yet
    (folder / "metrics.history.jsonl").unlink()
    with pytest.raises(ValueError, match=r"holds no metrics.jsonl; give a run folder"):
        runs.load(folder)


# -- verdict -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("asyppo/explained_var", lambda step: -0.01, "-0.01"),
        ("asyppo/sigma/p50", lambda step: 0.0, "0"),
        ("asyppo/sigma/p90", lambda step: 1.1, "1.1"),  # the limit is ten times the median, 1.0
        ("asyppo/critic_1/vf_loss", lambda step: step, "21.5"),  # started at 3.5, so that 7 is the limit
        ("asyppo/adv_masked_fraction", lambda step: 0.17, "0.17"),  # at least 0.9 x 0.2
        ("asyppo/adv_abs_masked", lambda step: 0.81, "0.81"),
        ("actor/entropy", lambda step: 1.0 if step <= 18 else 0.19, "0.19"),
        ("critic/score/mean", lambda step: 1 - 0.01 * step, "0.785"),
        ("actor/ppo_kl", lambda step: -0.06, "-0.06"),
        ("actor/pg_clipfrac", lambda step: math.nan if step == 7 else 0.1, "not finite in step 7"),
    ],
)
def test_the_verdict_names_what_is_outside_its_range_and_nothing_else(tmp_path, key, value, said):
    assert verdict.judge(runs.load(write_run(tmp_path / "healthy"))) == []
    findings = verdict.judge(runs.load(write_run(tmp_path / "ill", **{key: value})))
    also = {"asyppo/sigma/p90"} if key == "asyppo/sigma/p50" else set()  # it is measured by the median
    assert {finding.metric for finding in findings} == {key} | also
    assert findings[0].value == said and findings[0].advice


def test_a_limit_from_the_settings_is_the_run_s_own_and_one_critic_has_no_disagreement(tmp_path):
    masks_none = {"asyppo": {"adv_mask_fraction": 0.0}}
    run = write_run(tmp_path / "none", settings=masks_none, **{"asyppo/adv_masked_fraction": lambda step: 0.0})
    assert verdict.judge(runs.load(run)) == []
    equal = {"asyppo/sigma/p50": lambda step: 0.0, "asyppo/sigma/p90": lambda step: 0.0}
    alone = write_run(tmp_path / "alone", settings={"asyppo": {"num_critics": 1}}, **equal)
    assert verdict.judge(runs.load(alone)) == []


def test_the_documented_ranges_are_those_of_the_verdict(root):
    texts = [path.read_text() for path in (root / "README.md", *(root / "docs").glob("*.md"))]
    assert sum(ranges.table() in text for text in texts) == 1, "python -m recipe.asyppo.report.ranges prints the table"


# -- page --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of three runs, two of which differ in their seed only; the names and a setting of one are hostile."""
    folder = tmp_path_factory.mktemp("report")
    made = [write_run(folder / f"seed{seed}", seed=seed) for seed in (1, 2)]
    hostile = {"data": {"seed": 1, "train_files": HOSTILE}}
    bad = {"asyppo/explained_var": lambda step: -0.5}
    made.append(write_run(folder / HOSTILE.replace("/", ""), settings=hostile, **bad))
    main([*map(str, made), "--out", str(folder / "out")])
    return folder / "out/index.html"


def test_curves_and_numbers_are_those_of_the_log(report, opened):
    page = opened(report)
    (reward,) = page.evaluate("charts.filter(c => c.root.parentNode.innerText.startsWith('Reward')).map(c => c.data)")
    steps, mean, high, low, single = reward
    assert steps == list(range(1, 25))
    assert mean == pytest.approx([0.4 + 0.01 * step + 0.0015 for step in steps])
    assert low == pytest.approx([0.4 + 0.01 * step + 0.001 for step in steps])
    assert high == pytest.approx([0.4 + 0.01 * step + 0.002 for step in steps])
    assert single == low
    titles = page.locator("#curves h3").all_inner_texts()
    assert titles[:2] == ["Reward", "Entropy of the actor"] and "Time by phase, s" in titles

    card = page.locator(".card", has=page.get_by_text("Reward", exact=True))
    assert card.locator(".u-legend .u-value").first.inner_text() == "24"  # the last step where the mouse is elsewhere
    plot = card.locator(".u-over").bounding_box()
    page.mouse.move(plot["x"] + plot["width"] * 11 / 23, plot["y"] + 50)
    shown = card.locator(".u-legend tr:not(.edge) .u-value").all_inner_texts()
    assert shown == ["12", "0.5215", "0.521"]
    # The other panels show the same step.
    loss = page.locator(".card", has=page.get_by_text("Value loss", exact=True))
    assert loss.locator(".u-legend .u-value").nth(0).inner_text() == "12"
    assert loss.locator(".u-legend .u-value").nth(1).inner_text() == "0.08333"


def test_verdict_and_settings_are_shown_as_text(report, opened):
    page = opened(report)
    shown = page.locator("#verdict")
    assert "1 metric is outside" in shown.inner_text()
    cells = shown.locator("td").all_text_contents()
    assert cells[1:3] == ["asyppo/explained_var", "-0.5"] and cells[3].startswith("above 0")
    rows = page.locator("#settings tr").all()
    assert rows[1].locator("td").all_text_contents() == ["data.seed", "1", "2", "1"]
    assert rows[2].locator("td").all_text_contents() == ["data.train_files", "-", "-", HOSTILE]
    assert page.locator("img, iframe, object, link").count() == 0


@pytest.mark.parametrize("width", [1400, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_any_width_and_scheme(report, opened, width, scheme):
    page = opened(report, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("charts.every(c => c.width <= c.root.parentNode.clientWidth && c.width > 200)")
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", brightness)[:3])) > 384) == (scheme == "light")


def test_a_long_run_gives_a_small_page_that_hides_no_outlier(tmp_path):
    bad = {"asyppo/sigma/p90": lambda step: 50.0 if step == 1234 else 0.3}
    made = [write_run(tmp_path / f"s{seed}", seed=seed, steps=4000, **bad) for seed in range(3)]
    bands = [[runs.load(folder)] for folder in made]
    (sigma,) = [plot for plot in curves.sections(bands)["Critics"] if plot.title.startswith("Sigma")]
    assert len(sigma.steps) < 4000 and sigma.steps[-1] == 4000
    assert max(line.high[-1] or 0 for line in sigma.lines) == 0.3
    assert max(value for line in sigma.lines for value in line.high) == 50.0
    main([*map(str, made), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/index.html").stat().st_size < 3_000_000
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        f"{title.lower()}.png" for title in ("Learning", "Critics", "Selections", "Cost")
    }


def test_watching_rewrites_the_page_while_a_run_goes_on(tmp_path, opened):
    folder = tmp_path / "run"
    folder.mkdir()
    page = folder / "report/index.html"
    command = [sys.executable, "-m", "recipe.asyppo.report", str(folder), "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        try:
            assert "holds no metrics.jsonl" in watching.stdout.readline()
            for steps in (3, 5):
                shutil.rmtree(folder / "hydra", ignore_errors=True)
                write_run(folder, steps=steps)
                shown = ""
                while f"run ({steps} steps)" not in shown:  # the page may also have been written while the run was
                    assert "wrote" in watching.stdout.readline()
                    shown = opened(page).locator("#runs").inner_text()
            watching.send_signal(signal.SIGINT)
            assert watching.wait() == 0
        finally:
            watching.kill()
    assert '"live":false' in page.read_text()


# -- token view --------------------------------------------------------------------------------------------------------


def keep_tokens(run: Path, step: int, texts: list[list[str]], **changed) -> pandas.DataFrame:
    """What a run with two critics keeps of a step: one prompt, a response a text; numbers tell token and response apart."""
    rows = []
    for response, tokens in enumerate(texts):
        count, place = len(tokens), np.arange(len(tokens))
        row = {
            "step": step,
            "group": "g",
            "response": f"{response}_0",
            "prompt": "What is 1 + 1?",
            "score": float(response % 2),
            "token_id": place,
            "token": tokens,
            "reward": np.zeros(count, np.float32),
            "is_response": np.ones(count, bool),
            "value_0": (0.1 + response + place / 100).astype(np.float32),
            "value_1": (0.3 + response + place / 50).astype(np.float32),
            "sigma": (0.1 + place / 200).astype(np.float32),
            "advantage": np.where(place % 2, 1.5, -0.5).astype(np.float32),
            "advantage_after_mask": np.where(place == 0, 0, np.where(place % 2, 1.5, -0.5)).astype(np.float32),
            "masked": place == 0,
            "filtered": place == count - 1,
            "entropy": np.full(count, 0.25, np.float32),
        }
        rows.append(row | {key: value(count) for key, value in changed.items()})
    table = pandas.DataFrame(rows)
    (run / "checkpoints/inspect").mkdir(parents=True, exist_ok=True)
    table.to_parquet(run / f"checkpoints/inspect/step_{step:06d}.parquet")
    return table


def test_tokens_with_values_and_filters(tmp_path, opened):
    run = write_run(tmp_path / "run")
    keep_tokens(run, 10, [["old"]])
    keep_tokens(run, 20, [["So", " 1", "+", "1", " is", " 2"], [" two", "\n", "!"], ["so", "so", "so"]])
    main([str(run)])
    page = opened(run / "report/index.html")
    cards = page.locator(".response")
    assert cards.locator("h3").all_inner_texts() == [
        "Response 0_0 · reward 0 · 6 tokens",
        "Response 1_0 · reward 1 · 3 tokens",
        "Response 2_0 · reward 0 · 3 tokens",
    ]
    text = cards.nth(0).locator(".text")
    assert text.text_content() == "So 1+1 is 2"
    assert cards.nth(1).locator(".text").text_content() == " two\n!"
    data = page.evaluate("tokenCharts[0].data")
    assert data == [[1, 2, 3, 4, 5, 6], [0.1, 0.11, 0.12, 0.13, 0.14, 0.15], [0.3, 0.32, 0.34, 0.36, 0.38, 0.4]]

    text.locator("span").nth(3).hover()
    shown = cards.nth(0).locator(".numbers").inner_text().split()
    expected = "token 4 1 critic 0 0.13 critic 1 0.36 sigma 0.115 advantage 1.5 after the mask 1.5 entropy 0.25"
    assert shown == expected.split()
    assert cards.nth(0).locator(".u-legend .u-value").all_inner_texts() == ["4", "0.13", "0.36"]
    text.locator("span").nth(0).hover()
    assert "advantage -0.5 after the mask 0 entropy 0.25 masked" in " ".join(
        cards.nth(0).locator(".numbers").inner_text().split()
    )
    plot = cards.nth(0).locator(".u-over").bounding_box()
    page.mouse.move(plot["x"] + plot["width"] - 1, plot["y"] + 20)
    assert text.locator(".at").text_content() == " 2"

    page.locator("[name=masked]").check()
    page.locator("[name=filtered]").check()
    bright = cards.nth(0).locator(".text span:not(.faded)")
    assert bright.all_text_contents() == ["So", " 2"]
    page.locator("[name=responses]").select_option("right")
    assert cards.count() == 1 and "1_0" in cards.nth(0).inner_text()
    page.locator("[name=step]").select_option("1")
    assert cards.count() == 0 and page.locator(".prompt").text_content() == "What is 1 + 1?"


def test_a_run_that_was_moved_aside_has_no_tokens_of_the_next_one(tmp_path):
    config = {"trainer.default_local_dir": str(tmp_path / "next/checkpoints")}
    table = keep_tokens(tmp_path / "next", 10, [["new"]])
    aside = SimpleNamespace(folder=tmp_path / "aside", settings=config)
    assert len(kept(aside)) == 1 and len(table) == 1, "checkpoints that are elsewhere"
    (tmp_path / "aside/checkpoints").mkdir(parents=True)
    assert kept(aside) == []


def test_lists_are_means_over_everything_that_was_kept(tmp_path, opened):
    run = write_run(tmp_path / "run")
    keep_tokens(run, 5, [["a", "b", "a"], ["a", "b", "b"], ["", "", "c"]])
    main([str(run)])
    page = opened(run / "report/index.html")
    cards = page.locator(".lists .card")
    found = {card.locator("h3").inner_text(): card.locator("td").all_text_contents() for card in cards.all()[1:]}
    # Sigma by place: 0.1, 0.105, 0.11; |advantage|: 0.5, 1.5, 0.5. "c" is seen once, "" is a later byte.
    assert found["Highest mean sigma"] == ["b", "0.1067", "3", "a", "0.1033", "3"]
    assert found["Lowest mean sigma"] == ["a", "0.1033", "3", "b", "0.1067", "3"]
    assert found["Highest mean |advantage|"] == ["b", "1.167", "3", "a", "0.5", "3"]
    tenths = page.evaluate("tokenCharts.at(-1).data")
    assert tenths[0] == list(range(1, 11)) and tenths[1][0] == 0.5 and tenths[1][4] == 1.5


def test_any_text_is_shown_as_it_is_and_never_run(tmp_path, opened):
    run = write_run(tmp_path / "run")
    hostile = ["<script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>", HOSTILE, "\x00"]
    rtl = ["الجواب", " هو", " ٣٦", " = ", "שלום", "\u202e", "👩🏽‍🔬", "", "答案"]
    table = keep_tokens(run, 5, [hostile, rtl], prompt=lambda count: HOSTILE)
    # verl computes no entropy with rollout_correction.bypass_mode.
    table.drop(columns="entropy").to_parquet(run / "checkpoints/inspect/step_000005.parquet")
    main([str(run)])
    page = opened(run / "report/index.html")
    texts = page.locator(".response .text")
    shown = "".join(hostile).replace("\u202e", "⟨202e⟩").replace("\x00", "⟨0000⟩")
    assert texts.nth(0).text_content() == shown
    assert texts.nth(1).text_content() == "".join(rtl).replace("\u202e", "⟨202e⟩")
    assert page.locator(".prompt").text_content() == HOSTILE.replace("\u202e", "⟨202e⟩")
    assert page.locator("script").count() == 3 and page.locator("img").count() == 0
    first, last = (texts.nth(1).locator("span").nth(i).bounding_box() for i in (0, 2))
    assert first["x"] > last["x"], "read from the right to the left"
    assert "entropy" not in page.locator(".numbers").nth(0).inner_text()
    page.locator("[name=colour]").select_option("entropy")


def test_ten_thousand_tokens_are_shown_and_the_page_stays_small(tmp_path, opened):
    run = write_run(tmp_path / "run")
    rng = random.Random(0)
    texts = [[chr(rng.randrange(0x4E00, 0x9FFF)) * rng.randrange(1, 4) for _ in range(10_000)] for _ in range(8)]
    keep_tokens(run, 5, texts)
    main([str(run)])
    assert (run / "report/index.html").stat().st_size < 3_000_000
    page = opened(run / "report/index.html", 360)
    shown = page.locator(".response").count()
    assert 2 <= shown < 8 and f"{8 - shown} more responses" in page.locator("#tokens").inner_text()
    assert page.locator(".response .text").nth(0).text_content() == "".join(texts[0])
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator(".response .text span").nth(9_999).hover()
    assert "token 10000" in page.locator(".numbers").nth(0).inner_text()


def test_the_pictures_of_the_docs_are_made_from_a_run(tmp_path):
    run = write_run(tmp_path / "run")
    keep_tokens(run, 5, [["so", " 2"], ["no"]])
    command = [sys.executable, "-m", "recipe.asyppo.report.pictures", str(run), "--out", str(tmp_path / "docs")]
    subprocess.run(command, check=True, capture_output=True)
    curve, view = (tmp_path / "docs" / name for name in ("asyppo_cpu.png", "token_view.png"))
    for picture in (curve, view):
        height, width, _ = image.imread(picture).shape
        assert width > 900 and height > 300

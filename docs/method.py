"""Draw the picture of the method: ``python docs/method.py docs/method.png``. The selections in it are those of the package."""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from asyppo_verl.asyppo import ensemble_value, select_tokens

CRITICS = ("#2f6fb5", "#d9822b")
MASKED, FILTERED, TEXT, RULE = "#9aa3ad", "#c2415b", "#1f2933", "#d5dae0"
TOKENS = 30


def two_values() -> torch.Tensor:
    """Values of two critics along one response, (2, T): smooth, and apart by more here and less there."""
    place = torch.linspace(0, 1, TOKENS)
    mean = 0.42 + 0.38 * torch.sigmoid(14 * (place - 0.62)) - 0.16 * torch.exp(-(((place - 0.36) / 0.09) ** 2))
    apart = 0.075 * (1 + torch.sin(15.5 * place + 0.4)) * (0.35 + torch.exp(-(((place - 0.45) / 0.3) ** 2))) + 0.008
    side = torch.sign(torch.sin(7.2 * place + 1.1))
    return torch.stack([mean + side * apart, mean - side * apart])


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str, size: float) -> None:
    shape = f"round,pad=0,rounding_size={min(width, height) * 0.18}"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=color, edgecolor="none"))
    axes.text(x + width / 2, y + height / 2, text, color="white", ha="center", va="center", size=size, weight="bold")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=color, linewidth=1.4))


def draw_shards(axes: Axes) -> None:
    """The left half: an actor, the responses of one prompt, and the small critic that each of them trains."""
    axes.set(xlim=(0, 10), ylim=(0, 10))
    axes.axis("off")
    box(axes, 0.0, 3.2, 2.3, 3.6, "actor", TEXT, 13)
    axes.text(1.15, 2.55, "large", ha="center", color=TEXT, size=9.5)
    axes.text(5.05, 8.75, "responses to one prompt", ha="center", color=TEXT, size=9.5)
    for row, length in enumerate((11, 8, 12, 9, 12, 7)):
        y, color = 7.75 - 1.25 * row, CRITICS[row % 2]
        arrow(axes, (2.4, 5.0), (3.1, y), "#b6bec8")
        for token in range(length):
            axes.add_patch(Rectangle((3.25 + 0.31 * token, y - 0.24), 0.25, 0.48, facecolor=color, alpha=0.85))
        arrow(axes, (7.05, y), (8.1, 6.35 if row % 2 == 0 else 3.25), color)
    for critic, (color, y) in enumerate(zip(CRITICS, (5.75, 2.65), strict=True), start=1):
        box(axes, 8.2, y, 1.5, 1.2, f"critic {critic}", color, 9.5)
    axes.text(8.95, 2.0, "small", ha="center", color=TEXT, size=9.5)
    axes.text(5.05, 0.25, "and every critic values all of them", ha="center", color=TEXT, size=9.5)


def draw_values(axes: Axes, values: torch.Tensor, value: torch.Tensor) -> None:
    place = range(1, TOKENS + 1)
    axes.fill_between(place, *values, color="#7c6bb0", alpha=0.16, linewidth=0)
    for critic, (line, color) in enumerate(zip(values, CRITICS, strict=True), start=1):
        axes.plot(place, line, color=color, linewidth=1.8, label=rf"$V_{critic}$")
    axes.plot(place, value, color=TEXT, linewidth=1.6, linestyle=(0, (3, 2)), label=r"mean $V$: the value of GAE")
    axes.legend(loc="upper left", ncols=3, frameon=False, fontsize=9.5, handlelength=1.6, borderaxespad=0.1)
    axes.set_ylim(float(values.min()) - 0.03, float(values.max()) + 0.17)


def draw_sigma(axes: Axes, sigma: torch.Tensor, keep_adv: torch.Tensor, keep_ent: torch.Tensor) -> None:
    colors = [
        MASKED if not adv else FILTERED if not ent else "#b9b1d6" for adv, ent in zip(keep_adv, keep_ent, strict=True)
    ]
    axes.bar(range(1, TOKENS + 1), sigma, width=0.8, color=colors)
    axes.set_ylim(0, float(sigma.max()) * 1.12)
    axes.text(0.5, float(sigma.max()) * 0.98, r"$\sigma$, their spread", color=TEXT, size=9.5, va="top")


def draw_strip(axes: Axes, keep: torch.Tensor, name: str, dropped: str, color: str) -> None:
    """One square a token: full where it is used, crossed out where it is not."""
    for place, used in enumerate(keep.tolist(), start=1):
        face = "#e9e6f3" if used else "white"
        axes.add_patch(Rectangle((place - 0.4, 0.08), 0.8, 0.84, facecolor=face, edgecolor=color if not used else face))
        if not used:
            axes.text(place, 0.48, "0", color=color, ha="center", va="center", size=8.5, weight="bold")
    axes.set_ylim(0, 1)
    axes.text(-0.2, 0.5, name, ha="right", va="center", color=TEXT, size=9.5)
    axes.text(TOKENS + 1.0, 0.5, dropped, ha="left", va="center", color=color, size=9.5, weight="bold")


def draw() -> Figure:
    values = two_values()
    value, sigma = ensemble_value(values)
    keep_adv, keep_ent = select_tokens(
        sigma, torch.ones(TOKENS, dtype=torch.bool), adv_mask_fraction=0.2, entropy_filter_fraction=0.2
    )
    figure = plt.figure(figsize=(13, 4.7), facecolor="none")
    figure.add_artist(
        FancyBboxPatch(
            (0.004, 0.01), 0.992, 0.98, boxstyle="round,pad=0,rounding_size=0.02", facecolor="white",
            edgecolor=RULE, transform=figure.transFigure, zorder=-1, mutation_aspect=13 / 4.7,
        )
    )  # fmt: skip
    titles = {
        0.028: "1  Each response trains one mini-critic",
        0.435: "2  Their mean is the value, their spread picks the tokens",
    }
    for x, title in titles.items():
        figure.text(x, 0.905, title, size=13, weight="bold", color=TEXT)
    draw_shards(figure.add_axes((0.028, 0.06, 0.36, 0.82)))
    rows = {"values": (0.50, 0.36), "sigma": (0.285, 0.185), "advantage": (0.175, 0.075), "bonus": (0.075, 0.075)}
    axes = {name: figure.add_axes((0.515, bottom, 0.33, height)) for name, (bottom, height) in rows.items()}
    for each in axes.values():
        each.set_xlim(0.4, TOKENS + 0.6)
        each.set(xticks=[], yticks=[])
        for side in ("top", "right", "left", "bottom"):
            each.spines[side].set_visible(side == "bottom" and each in (axes["values"], axes["sigma"]))
            each.spines[side].set_color(RULE)
    draw_values(axes["values"], values, value)
    draw_sigma(axes["sigma"], sigma, keep_adv, keep_ent)
    draw_strip(axes["advantage"], keep_adv, "advantage", "lowest 20 %: masked", "#697580")
    draw_strip(axes["bonus"], keep_ent, "entropy bonus", "highest 20 %: withheld", FILTERED)
    axes["values"].text(
        TOKENS + 1.0, float(value[-1]), "one response,\ntoken by token", color=TEXT, size=9.5, va="center"
    )
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="PNG")
    draw().savefig(parser.parse_args().out, dpi=140)

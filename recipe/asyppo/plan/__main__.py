"""Plan a run before it is started: ``python -m recipe.asyppo.plan --actor qwen3-4b --critic qwen3-0.6b``.

Prints the memory of a GPU in every phase of a step, whether it fits, the work of a step and the critics' share of it, for AsyPPO
and its three baselines side by side. Options have the names of verl's keys; ``--explain`` lists every assumption.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence

from recipe.asyppo.plan.model import BUILT_IN, read_model
from recipe.asyppo.plan.report import explanation, plans, table
from recipe.asyppo.plan.settings import Settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipe.asyppo.plan", description=(__doc__ or "").split("\n\n")[1])
    models = f"a folder or hub name in Hugging Face format, or {', '.join(BUILT_IN)} of Qwen3, which need no download"
    parser.add_argument("--actor", required=True, help=models)
    parser.add_argument("--critic", required=True, help="the mini-critics' model, likewise")
    for field in dataclasses.fields(Settings):
        if not field.metadata:
            continue
        option, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if isinstance(field.default, bool):
            parser.add_argument(option, action="store_true", help=text)
        else:
            kind = type(field.default)
            parser.add_argument(
                option,
                type=kind,
                default=field.default,
                choices=field.metadata.get("choices"),
                help=f"{text} [%(default)s]",
            )
    parser.add_argument("--explain", action="store_true", help="list the assumptions, and what every phase holds")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    explain, as_json = options.pop("explain"), options.pop("json")
    try:
        for role in ("actor", "critic"):
            try:
                options[role] = read_model(options[role])
            except ValueError as error:
                raise ValueError(f"--{role}: {error}") from error
        options["critic"] = options["critic"].as_critic()
        settings = Settings(**options)
    except ValueError as error:
        parser.error(str(error))
    if as_json:
        found = {algorithm: plan.summary() for algorithm, plan in plans(settings).items()}
        print(json.dumps({"settings": dataclasses.asdict(settings), "algorithms": found}, indent=2))
    else:
        print(table(settings) + (explanation(settings) if explain else ""))


if __name__ == "__main__":
    main()

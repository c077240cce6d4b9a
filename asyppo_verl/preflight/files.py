"""Data of the run: prompts that verl can read."""

import os

from omegaconf import OmegaConf

from asyppo_verl.critic_settings import Run

LOOPS = ("single_turn_agent", "tool_agent")
"""verl's own agent loops."""


def check_prompts(run: Run) -> None:
    """Refuse prompts that are plain text, of which a chat template leaves nothing, without a word.

    Nothing is said where the user's own code may read them: a dataset, an agent loop, or those that an ``agent_name`` names.
    """
    from pyarrow import ArrowException, parquet, types

    key, agent = run.config.data.prompt_key, "actor_rollout_ref.rollout.agent"
    is_own = run.get(f"{agent}.agent_loop_manager_class") or run.get(f"{agent}.default_agent_loop") not in LOOPS
    if run.get("data.custom_cls.path") or is_own:
        return
    for setting in ("data.train_files", "data.val_files"):
        files = run.get(setting)
        for name in files if OmegaConf.is_list(files) else [files]:
            try:
                schema = parquet.read_schema(os.path.expanduser(name))
            except (ArrowException, OSError, TypeError):
                continue  # another format, another place, or not there, which verl says first of all
            names = {*schema.names}
            kind = schema.field(key).type if key in names and "agent_name" not in names else None
            if kind and (types.is_string(kind) or types.is_large_string(kind)):
                raise ValueError(
                    f"{setting}={name}: the prompts in column {key!r} are plain text, and verl reads messages; make each "
                    '[{"role": "user", "content": text}]'
                )

"""Turn a checkpoint into Hugging Face folders: ``python -m asyppo_verl.export CHECKPOINT OUT``.

OUT gets ``actor``, ``critic_0``, ``critic_1``, ... (``critic`` after a run with verl's own critic), each with weights,
configuration and tokenizer: for ``from_pretrained``, for ``critic.model.path`` of a new run, for an inference engine.
"""

import argparse
import contextlib
import io
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForTokenClassification
from verl.model_merger.base_model_merger import ModelMergerConfig
from verl.model_merger.fsdp_model_merger import FSDPModelMerger

from asyppo_verl.checkpoint import check_shards, find_checkpoint, find_models


def export(checkpoint: Path, out: Path, *, trust_remote_code: bool = False) -> list[str]:
    """Write every model of a checkpoint into a folder of its own below ``out``, with the weights bit for bit.

    Args:
        checkpoint: A ``global_step_N`` folder, or a run folder, whose latest checkpoint is taken.
        out: A folder that does not exist yet; it appears when everything is in it.

    Returns:
        The names of the folders.

    Raises:
        ValueError: naming the folder and what is wrong with it; nothing has then been written.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; name a new folder, or remove it")
    models = find_models(find_checkpoint(checkpoint))
    for folder in models.values():
        check_shards(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as aside:
        exported = Path(aside) / out.name
        for name, folder in models.items():
            _Merger(folder, exported / name, is_critic=name != "actor", trust_remote_code=trust_remote_code).export()
        exported.rename(out)
    return list(models)


class _Merger(FSDPModelMerger):
    """verl's merger, except that weights are not rounded to bfloat16 and that a critic is one whatever its config says.

    verl's own critics keep the name of the causal model that they were started from in their configuration.
    """

    def __init__(self, folder: Path, out: Path, *, is_critic: bool, trust_remote_code: bool) -> None:
        self.is_critic = is_critic
        config = ModelMergerConfig(
            operation="merge",
            backend="fsdp",
            local_dir=str(folder),
            target_dir=str(out),
            hf_model_config_path=str(folder / "huggingface"),
            trust_remote_code=trust_remote_code,
        )
        super().__init__(config)

    def export(self) -> None:
        """Merge and save, then check that transformers finds every weight in the folder.

        Raises:
            ValueError: if it would have to draw some of them anew.
        """
        self.merge_and_save()
        _, info = self.get_transformers_auto_model_class().from_pretrained(
            self.config.target_dir,
            device_map="meta",
            output_loading_info=True,
            trust_remote_code=self.config.trust_remote_code,
        )
        wrong = {kind: sorted(names)[:3] for kind, names in info.items() if names}
        if wrong:
            raise ValueError(f"{self.config.local_dir} does not fit its huggingface/config.json, for example {wrong}")

    def get_transformers_auto_model_class(self) -> Any:
        return AutoModelForTokenClassification if self.is_critic else super().get_transformers_auto_model_class()

    def _load_rank_zero_state_dict(self, world_size: int) -> dict:
        return self._load_rank(world_size, 0)

    def _load_rank(self, world_size: int, rank: int) -> dict:
        path = Path(self.config.local_dir) / f"model_world_size_{world_size}_rank_{rank}.pt"
        try:
            return torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}); copy it again") from error

    def _load_and_merge_state_dicts(
        self, world_size: int, total_shards: int, mesh_shape: tuple[int, ...], mesh_dim_names: tuple[str, ...]
    ) -> dict[str, Tensor]:
        ranks = [self._load_rank(world_size, rank) for rank in range(total_shards)]
        return {name: self._join([rank[name] for rank in ranks]) for name in ranks[0]}

    def _join(self, shards: list[Any]) -> Tensor:
        if not isinstance(shards[0], DTensor):
            return shards[0]  # every rank holds all of what is not sharded
        return self._merge_by_placement([shard.to_local() for shard in shards], shards[0].placements[-1])

    def save_hf_model_and_tokenizer(self, state_dict: dict[str, Tensor]) -> None:
        dtype = next(iter(state_dict.values())).dtype
        super().save_hf_model_and_tokenizer(state_dict)
        # verl's bfloat16 stands in the configuration now, and transformers would round to it when loading.
        config = AutoConfig.from_pretrained(self.config.target_dir, trust_remote_code=self.config.trust_remote_code)
        config.dtype = dtype
        config.save_pretrained(self.config.target_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoint", type=Path, help="a global_step_N folder, or a run folder for its latest checkpoint"
    )
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own Python code")
    arguments = parser.parse_args()
    try:
        # verl's messages name the folder that is renamed at the end.
        with contextlib.redirect_stdout(io.StringIO()):
            names = export(arguments.checkpoint, arguments.out, trust_remote_code=arguments.trust_remote_code)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for name in names:
        print(f"wrote {arguments.out / name}")
    if "actor" not in names:
        print("the checkpoint holds no actor")
    if names == ["actor"]:
        print("the checkpoint holds no critic")


if __name__ == "__main__":
    main()

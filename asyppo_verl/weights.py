"""Whether a model folder holds whole weights, looked at without reading them."""

import json
from pathlib import Path


def check_weights(key: str, folder: Path) -> None:
    """Refuse a local model folder whose weights are missing, incomplete or cut off.

    Args:
        key: the setting that names the folder.
        folder: in Hugging Face format.

    Raises:
        ValueError: naming key, file and cure.
    """
    from safetensors import SafetensorError, safe_open  # late: every process that imports verl loads this module

    cure = "copy or download the model again"
    names = {path.name for path in folder.iterdir()}
    for index in folder.glob("*.index.json"):
        missing = sorted(set(json.loads(index.read_text())["weight_map"].values()) - names)
        if missing:
            raise ValueError(f"{key}={folder} lacks {', '.join(missing)}, which {index.name} lists; {cure}")
    if not any(name.endswith((".safetensors", ".bin")) for name in names):
        raise ValueError(f"{key}={folder} has a configuration but no weights (*.safetensors); {cure}")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):  # reads the header, which says how long the file must be
                pass
        except SafetensorError as error:
            raise ValueError(f"{key}={folder}: {file.name} is damaged ({error}); {cure}") from error

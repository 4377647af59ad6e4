"""Code that a checkpoint brings along (auto_map): run where it is ours, byte for byte, and only there."""

from pathlib import Path
from typing import Any

from eclectus.models.checkpoints.config_file import read_json_object
from eclectus.models.checkpoints.families import UnsupportedModelError

MODELS = Path(__file__).parents[1]
# What Lory checkpoints and layered exports carry.
CARRIED = (*sorted((MODELS / "lory").glob("*.py")), MODELS / "mixture" / "layered.py")
REFUSED = "it is not run; export the checkpoint again, or remove auto_map from config.json and the code"


def brings_our_code(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a checkpoint brings code to run, which then is this installation's. config: of its config.json.

    Raises UnsupportedModelError for any other code: nothing that came with a model is run by default.
    """
    classes = config.get("auto_map")
    if not classes:
        return False
    ours = {path.name: path for path in CARRIED}
    for name in classes.values() if isinstance(classes, dict) else [classes]:
        # "owner/name--module.Class" is code of a repository on the hub.
        if not isinstance(name, str) or f"{name.partition('.')[0]}.py" not in ours:
            raise UnsupportedModelError(f"{folder} names code that is not of Eclectus (auto_map: {name!r}): {REFUSED}")
    for path in sorted(folder.glob("*_config.json")):
        # Ours name code in config.json alone, not for tokenizers.
        if read_json_object(path).get("auto_map"):
            raise UnsupportedModelError(f"{path} names code too (auto_map): {REFUSED}")
    for path in sorted(folder.rglob("*.py")):
        if path.name not in ours or path.read_bytes() != ours[path.name].read_bytes():
            raise UnsupportedModelError(f"{path} is not this version's code: {REFUSED}")
    return True

"""The door into models (models/checkpoints/door.py) for flows: a base is checked in seconds, before anything is read.

Flows call these first thing, with the base's own name as the user gave it. A model on the hub passes when it has been
fetched; every model passes again wherever it is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import check_path, check_tree
from eclectus.tasks.training.without_torch import without_torch

if TYPE_CHECKING:
    from eclectus.models.checkpoints.door import Checked

EVALUATED = "evaluation_tokens"
# Methods that add experts to a model that has some already.
ADDING = ("moe_lpr", "no_review", "no_lpr")


def check_base(
    name: str, path: str | Path | None = None, to_upcycle: bool = False, what: str = "base model"
) -> Checked | None:
    """What the checkpoint is, None if its place is not on this machine (a name on the hub).

    path: where it lies if that is not its name. what: how messages call it. Raises EclectusError in one line: name,
    file, field, remedy.
    """
    from eclectus.models.checkpoints.door import check_checkpoint

    place = Path(path or name)
    if not place.exists():
        return None
    check_files(place, f"{what} {name}")
    try:
        return check_checkpoint(place, to_upcycle=to_upcycle)
    except (ValueError, OSError) as error:
        raise EclectusError(f"{what} {name}: {error}") from error


def check_files(place: Path, what: str) -> None:
    """Raises EclectusError if a file that opening a model would read lies outside the allowed folders (ECLECTUS_ROOTS).

    place: its folder, or its .gguf file, beside which shards and side files lie. what: the model, for the message.
    """
    if place.is_dir():
        check_tree(place, what, depth=2)
        return
    files = without_torch("checkpoints/side_files.py")
    beside = [place.parent / each for each in ("config.json", *files.side_files(place.parent))]
    for path in (*files.gguf_shards(place), place, *beside):
        check_path(path, what)


def check_base_to_extend(name: str, method: str, tokens: int, path: str | Path | None = None) -> None:
    """Raises EclectusError unless a method can extend the base to instances of this many tokens.

    method: `extension_method`. path: as in `check_base`.
    """
    from eclectus.models.extension.recipes import recipe_of

    checked = check_base(name, path)
    if checked is None:
        return
    if checked.kind == "other":
        raise EclectusError(f"base model {name}: {_no_base(checked)}")
    if checked.kind != "dense" and method not in ADDING:
        what = "a Lory model" if checked.kind == "lory" else "a mixture of experts"
        raise EclectusError(
            f"extension_method {method} starts from a dense model, and base model {name} is {what}; choose "
            f"{', '.join(ADDING)}, or give the dense base (eclectus export --extract-base)"
        )
    if checked.kind == "dense" and recipe_of(method).start in ("upcycled", "blocks"):
        check_base(name, path, to_upcycle=True)
    check_length(name, checked.positions, tokens, "instance_tokens")


def check_dense_start(name: str, tokens: int, path: str | Path | None = None) -> None:
    """Raises EclectusError unless Lory can start from the checkpoint: LLaMA-shaped, with enough positions."""
    checked = check_base(name, path, what="dense_start")
    if checked is None or not checked.config:
        return
    config = checked.config
    if config.get("model_type") != "llama" or config.get("mlp_bias") or config.get("hidden_act", "silu") != "silu":
        raise EclectusError(
            f"dense_start {name} is a {config.get('model_type')} with hidden_act {config.get('hidden_act')}; Lory "
            "starts from LLaMA-shaped checkpoints (model_type llama, silu, no mlp_bias)"
        )
    check_length(name, checked.positions, tokens, "instance_tokens")


def check_base_to_measure(name: str, tokens: int) -> None:
    """Raises EclectusError unless the similarity of languages can be measured in the model's layers.

    tokens: length of a sample.
    """
    checked = check_base(name)
    if checked is None:
        return
    if checked.kind != "dense":
        raise EclectusError(f"base model {name}: {_no_base(checked)}")
    check_length(name, checked.positions, tokens, "the length of a sample in tokens,")


def check_to_evaluate(name: str, path: str | Path, tokens: int) -> None:
    """Raises EclectusError unless a model can be opened and has the positions for windows of `tokens`."""
    checked = check_base(name, path, what="model")
    if checked is not None:
        check_length(name, checked.positions, tokens, EVALUATED)


def check_length(name: str, positions: int | None, tokens: int, setting: str) -> None:
    """Raises EclectusError for sequences of more tokens than the model has positions."""
    if positions is not None and tokens > positions:
        raise EclectusError(
            f"{setting} {tokens} is more than the {positions} positions of {name} (max_position_embeddings); lower it"
        )


def open_checked(checkpoint: str | Path, name: str) -> Any:
    """The model in a directory, in fp32. name: for messages. Raises EclectusError naming it and what is wrong."""
    from eclectus.models.checkpoints.door import open_model

    try:
        return open_model(checkpoint)
    except ValueError as error:
        raise EclectusError(f"{name} cannot be opened: {error}") from error


def _no_base(checked: Checked) -> str:
    from eclectus.models.checkpoints.families import FAMILIES, MOE_FAMILIES

    model_type = checked.config.get("model_type")
    if model_type in MOE_FAMILIES:
        return (
            f"a {model_type!r} mixture that was not upcycled here (no upcycled_from in its config.json); give a dense "
            f"base: {', '.join(FAMILIES)}"
        )
    return f"a {model_type!r} model; bases that can be extended: {', '.join(FAMILIES)}"

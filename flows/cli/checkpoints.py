"""Commands on checkpoints alone, without a run: upcycle one, export one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from eclectus.storage.errors import EclectusError

MERGED_BY = ("domain", "language", "prompt")


def add_checkpoint_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `upcycle` and `export`. add: as in `eclectus.flows.cli.main`, (name, action, help, positional words)."""
    made = add(
        "upcycle",
        _upcycle,
        "make a dense checkpoint a mixture of experts that computes the same, proved on its logits",
        base="dense checkpoint (Llama, Mistral, Qwen2, Qwen3): a folder, a .gguf file, an artifact's name or a model on the hub",
        out="folder to write, not there yet or empty",
    )
    made.add_argument(
        "--experts", default="6", help="experts of a layer, the original included: one number, or one a layer as 4,6,4"
    )
    made.add_argument("--top-k", type=int, default=2, help="experts that each token is sent to (default: 2)")
    made.add_argument(
        "--init", default="copy", help="new experts start as copies (copy), with noise, or partly redrawn (drop)"
    )
    made.add_argument(
        "--noise-scale", type=float, default=0.01, help="noise, as a part of each matrix's deviation (default: 0.01)"
    )
    made.add_argument(
        "--drop-ratio", type=float, default=0.5, help="part of the inner dimensions that drop redraws (default: 0.5)"
    )
    made.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference of a logit over the largest logit (default: 1e-4)",
    )
    made.add_argument("--seed", type=int, default=0, help="seed of routers and redrawn weights (default: 0)")
    made.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the checkpoint brings, and prove against it"
    )
    export = add(
        "export",
        _export,
        "write a mixture as a stock checkpoint with its model card, or a Lory checkpoint as a dense LLaMA",
        checkpoint="checkpoint, as in `artifacts`, or its folder",
        out="folder to write, not there yet or empty",
    )
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="type of the stored weights (default: as they are)"
    )
    export.add_argument(
        "--extract-base", action="store_true", help="write the dense model that a mixture was made of, bit by bit"
    )
    merged_by = export.add_mutually_exclusive_group()
    merged_by.add_argument("--domain", help="Lory: merge by the mean routing of this domain's training text")
    merged_by.add_argument("--language", help="Lory: merge by the mean routing of this language's training text")
    merged_by.add_argument("--prompt", help="Lory: merge by the routing of this text")


def _upcycle(chosen: argparse.Namespace) -> None:
    from eclectus.storage.home import Home
    from eclectus.tasks.training.fetch_model import find_checkpoint
    from eclectus.tasks.training.upcycle import UpcycleSettings, upcycle_folder

    experts = _counts(chosen.experts)
    values = {
        "extension_experts": max(experts),
        "extension_experts_per_layer": experts if len(experts) > 1 else [],
        "extension_top_k": chosen.top_k,
        "extension_init": chosen.init,
        "extension_noise_scale": chosen.noise_scale,
        "extension_drop_ratio": chosen.drop_ratio,
        "upcycle_tolerance": chosen.tolerance,
        "seed": chosen.seed,
    }
    settings = UpcycleSettings.read(values, "the command line")
    out = Path(chosen.out)
    made = upcycle_folder(
        find_checkpoint(Home.open().store, chosen.base), out, settings, trust_remote_code=chosen.trust_remote_code
    )
    held = f"{made.experts} experts" if made.experts_per_layer is None else f"{made.experts_per_layer} experts"
    print(f"{out}: {made.base_model_type} to {made.model_type}, {held} a layer, top {made.top_k}")
    print(f"  parameters   {made.base_parameters:,} to {made.parameters:,}")
    print(
        f"  proof        no logit differs by more than {made.max_abs_delta:.2g} ({made.proof}; largest logit {made.max_abs_logit:.3g}, "
        f"allowed {made.tolerance:g} of it)"
    )
    for note in made.notes:
        print(f"  note         {note}")


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise EclectusError(f"--experts is '{text}'; expected a number, or one a layer such as 4,6,4") from None


def _export(chosen: argparse.Namespace) -> None:
    from eclectus.storage.home import Home
    from eclectus.tasks.export.lory import export
    from eclectus.tasks.export.mixture import checkpoint_folder, export_mixture, model_type

    home, out = Home.open(), Path(chosen.out)
    lory = model_type(checkpoint_folder(home, chosen.checkpoint)[0]) == "lory"
    mine, others = (MERGED_BY, ("dtype", "extract_base")) if lory else (("dtype", "extract_base"), MERGED_BY)
    if wrong := [name for name in others if getattr(chosen, name)]:
        kind = "a Lory model" if lory else "no Lory model"
        raise EclectusError(
            f"--{wrong[0].replace('_', '-')} does not go with {chosen.checkpoint}, {kind}; its options: "
            f"{', '.join('--' + name.replace('_', '-') for name in mine)}"
        )
    if lory:
        print(export(home.store, chosen.checkpoint, out, chosen.domain, chosen.language, chosen.prompt))
    else:
        print(export_mixture(home, chosen.checkpoint, out, chosen.dtype, chosen.extract_base))

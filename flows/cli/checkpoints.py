"""Commands on checkpoints, without a run: `upcycle`, `export`, `certify`, `push`, `pull`; and `export-instances`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from eclectus.flows.cli.certify import add_certify_command
from eclectus.flows.cli.exchange import add_hub_commands
from eclectus.storage.errors import EclectusError

# Options of `export` by kind of model.
OPTIONS = {
    "lory": ("domain", "language", "prompt", "dtype"),
    "mixture": ("dtype", "extract_base"),
    "dense": ("dtype",),
}


def add_checkpoint_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `upcycle`, `export`, `certify`, `push` and `pull`. add: the function in `eclectus.flows.cli.main`."""
    made = add(
        "upcycle",
        _upcycle,
        "upcycle a dense checkpoint to a mixture of experts with equal logits (verified)",
        base="dense checkpoint (Llama, Mistral, Qwen2, Qwen3): folder, .gguf file, artifact or hub model",
        out="folder to write; must be new or empty",
    )
    made.add_argument(
        "--experts",
        default="6",
        help="experts per layer, the original included: one number, or one for each layer as 4,6,4",
    )
    made.add_argument("--top-k", type=int, default=2, help="experts per token (default: 2)")
    made.add_argument(
        "--init",
        default="copy",
        help="how new experts start: copy, noise (copies with noise) or drop (partly re-initialized; default: copy)",
    )
    made.add_argument(
        "--noise-scale",
        type=float,
        default=0.01,
        help="noise, relative to each matrix's standard deviation (default: 0.01)",
    )
    made.add_argument(
        "--drop-ratio",
        type=float,
        default=0.5,
        help="share of the inner dimensions that drop re-initializes (default: 0.5)",
    )
    made.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest allowed difference of a logit, relative to the largest logit (default: 1e-4)",
    )
    made.add_argument("--seed", type=int, default=0, help="seed of routers and re-initialized weights (default: 0)")
    made.add_argument(
        "--trust-remote-code", action="store_true", help="run code from the checkpoint, and verify against it"
    )
    export = add(
        "export",
        _export,
        "export a mixture, dense or Lory model (as a dense LLaMA) as stock files or GGUF, with a model card",
        checkpoint="checkpoint, as in `artifacts`, or its folder",
        out="folder to write; must be new or empty",
    )
    export.add_argument(
        "--format",
        choices=("safetensors", "gguf"),
        default="safetensors",
        help="safetensors for transformers and vLLM (default), or one GGUF file for llama.cpp",
    )
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="type of the stored weights (default: unchanged)"
    )
    export.add_argument(
        "--extract-base",
        action="store_true",
        help="export the dense model that the mixture was upcycled from, bit-identical",
    )
    merged_by = export.add_mutually_exclusive_group()
    merged_by.add_argument("--domain", help="Lory: merge by the mean routing of this domain's training text")
    merged_by.add_argument("--language", help="Lory: merge by the mean routing of this language's training text")
    merged_by.add_argument("--prompt", help="Lory: merge by the routing of this text")
    instances = add(
        "export-instances",
        _export_instances,
        "write training instances in the files of other trainers: the same tokens in the same order",
        instances="artifact of kind instances: KIND-DIGITS, a digest or the start of one, a tag, or its folder",
        out="folder to write; must be new or empty",
    )
    instances.add_argument(
        "--format",
        required=True,
        help="jsonl (TRL, transformers), megatron (also NeMo), mosaic (also LLM Foundry), litgpt or grain (also "
        "MaxText); packs for fine-tuning, with loss masks: llamafactory, axolotl, trl, nemo (Megatron Bridge), or "
        "messages (text, in the order of the packs)",
    )
    instances.add_argument(
        "--documents", help="for messages: the documents that were packed (default: those that lineage names)"
    )
    instances.add_argument(
        "--without-loss-mask",
        action="store_true",
        help="write conversations in a format that cannot hold their loss mask",
    )
    add_certify_command(add)
    add_hub_commands(add)


def _upcycle(chosen: argparse.Namespace) -> None:
    from eclectus.storage.home import Home
    from eclectus.tasks.export.mixture import seal
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
        find_checkpoint(Home.found().store, chosen.base), out, settings, trust_remote_code=chosen.trust_remote_code
    )
    held = f"{made.experts} experts" if made.experts_per_layer is None else f"{made.experts_per_layer} experts"
    print(f"{out}: {made.base_model_type} to {made.model_type}, {held} per layer, top {made.top_k}")
    print(f"  parameters   {made.base_parameters:,} to {made.parameters:,}")
    print(
        f"  proof        no logit differs by more than {made.max_abs_delta:.2g} ({made.proof}; largest logit "
        f"{made.max_abs_logit:.3g}, allowed {made.tolerance:g} of it)"
    )
    for note in made.notes:
        print(f"  note         {note}")
    seal(out, None)
    _name_left_behind(out)


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise EclectusError(f"--experts is '{text}'; expected a number, or one for each layer such as 4,6,4") from None


def _export_instances(chosen: argparse.Namespace) -> None:
    from eclectus.storage.home import Home
    from eclectus.tasks.export.instances import export_instances
    from eclectus.tasks.export.packs import MESSAGES, packed_documents

    artifact = Home.found().store.find_whole(chosen.instances)
    if artifact.kind != "instances":
        raise EclectusError(f"{artifact.name} is of kind {artifact.kind}; give an artifact of kind instances")
    documents = None
    if chosen.format == MESSAGES:
        name = chosen.documents or packed_documents(Home.found(), artifact)
        documents = Home.found().store.find_whole(name)
    done = export_instances(
        Path(artifact.path), Path(chosen.out), chosen.format, documents, without_loss_mask=chosen.without_loss_mask
    )
    print(f"{chosen.out}: {done.instances:,} instances, {done.tokens:,} tokens in {len(done.files)} files")
    for each in done.lost:
        print(f"  lost: {each}")


def _export(chosen: argparse.Namespace) -> None:
    from eclectus.storage.home import Home
    from eclectus.tasks.export.gguf import export_gguf
    from eclectus.tasks.export.lory import export
    from eclectus.tasks.export.mixture import checkpoint_folder, export_dense, export_mixture, kind_of

    home, out = Home.found(), Path(chosen.out)
    kind = kind_of(checkpoint_folder(home, chosen.checkpoint)[0])
    allowed = OPTIONS[kind]
    if wrong := [name for names in OPTIONS.values() for name in names if name not in allowed and getattr(chosen, name)]:
        what = {"lory": "a Lory model", "mixture": "a mixture, not a Lory model", "dense": "a dense model"}[kind]
        raise EclectusError(
            f"--{wrong[0].replace('_', '-')} does not apply to {chosen.checkpoint}, which is {what}; its options: "
            f"{', '.join('--' + name.replace('_', '-') for name in allowed)}"
        )
    merged_by = {name: getattr(chosen, name) for name in ("domain", "language", "prompt")}
    if chosen.format == "gguf":
        if chosen.extract_base:
            raise EclectusError("--extract-base writes safetensors; export that folder with --format gguf afterwards")
        print(export_gguf(home, chosen.checkpoint, out, chosen.dtype, **merged_by))
    elif kind == "lory":
        print(export(home.store, chosen.checkpoint, out, **merged_by, dtype=chosen.dtype))
    elif kind == "mixture":
        print(export_mixture(home, chosen.checkpoint, out, chosen.dtype, chosen.extract_base))
    else:
        print(export_dense(home, chosen.checkpoint, out, chosen.dtype))
    _name_left_behind(out)


def _name_left_behind(out: Path) -> None:
    from eclectus.models.staged_folder import left_behind

    for folder in left_behind(out):
        print(f"  note         {folder} is from a command that was killed, or that runs now; remove it if none does")

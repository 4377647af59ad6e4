"""What `test_killed.py` runs: pre-training of a dense and a sharded Lory model, by a run with Ray workers or plainly under torchrun."""

import json
import sys
from pathlib import Path

from eclectus.flows.run import open_run
from eclectus.storage.artifact import Artifact, read_manifest
from eclectus.storage.home import Home
from eclectus.tasks.training.pretrain import PretrainSettings, PretrainStageSettings, pretrain, train_stage

STAGES = (("warmup", False), ("dense", False), ("lory", True))


def artifact(path):
    manifest = read_manifest(Path(path))
    return Artifact(manifest["kind"], manifest["digest"], path)


def by_ray(home, instances, tokenizer, settings):
    """Prints the folders of the checkpoints."""
    chosen, made, warm = PretrainSettings(**settings), {}, None
    with open_run("pretrain", chosen, Home.open(home)):
        for stage, sharded in STAGES:
            made[stage] = pretrain(
                label=stage,
                instances=artifact(instances),
                tokenizer=artifact(tokenizer),
                start=warm,
                settings=PretrainStageSettings.of(chosen, pretrain_stage=stage, training_sharded=sharded),
            )
            warm = warm or made[stage]
    print(json.dumps({stage: each.path for stage, each in made.items()}))


def by_torchrun(home, instances, tokenizer, settings):
    """Writes the same checkpoints, undisturbed, into folders named by their stage."""
    from eclectus.models.training.process import Process

    process, start, moments = Process.current(), None, None
    for stage, sharded in STAGES:
        chosen = PretrainStageSettings(**settings, pretrain_stage=stage, training_sharded=sharded)
        out, work = Path(home) / stage, Path(home) / "work" / stage
        if process.is_main:
            out.mkdir(parents=True)
            work.mkdir(parents=True)
        process.barrier()
        train_stage(
            process,
            lambda kind, **values: None,
            instances,
            tokenizer,
            chosen.model_dump(),
            start,
            moments,
            str(work),
            str(out),
        )
        if stage == "warmup":
            start, moments = str(out), str(out / "moments.safetensors")


if __name__ == "__main__":
    {"ray": by_ray, "torchrun": by_torchrun}[sys.argv[1]](*sys.argv[2:5], json.loads(sys.argv[5]))

"""What attention within documents costs and gives: dense and Lory, trained and scored with and without the mask.

    python benchmarks/document_mask.py HOME SOURCE [SOURCE ...] [--steps 700] [--languages en] [--seed 0]

Trains the dense twin and Lory of the default configuration on the sources, packed as one text and within documents
(`pack_document_mask`), and scores all four on the same held-out text in both ways. Within documents the first token of
each is not scored, so the two columns of bits per byte are over slightly different bytes; compare within a column.
Seconds are of this process. What is in HOME is reused, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse

from eclectus.flows.parameters import PretrainParameters
from eclectus.flows.pretrain import pretrain
from eclectus.flows.run import open_run
from eclectus.storage.artifact import Artifact
from eclectus.storage.home import Home
from eclectus.tasks.evaluation.evaluate import EvaluateSettings, evaluate


def parameters_of(given: argparse.Namespace, mask: bool) -> PretrainParameters:
    return PretrainParameters(
        sources=given.sources,
        original_languages=given.languages,
        expanded_languages=[],
        pretrain_steps=given.steps,
        training_workers=0,
        seed=given.seed,
        pack_document_mask=mask,
    )


def trained(home: Home, given: argparse.Namespace, mask: bool) -> dict[str, tuple[Artifact, list[float]]]:
    """By model: (checkpoint, bits per byte as one text and within documents)."""
    parameters, found = parameters_of(given, mask), {}
    with open_run("pretrain", parameters, home):
        made = pretrain.whole(parameters)
        for name, checkpoint in (("dense", made.dense), ("lory", made.lory)):
            scores = []
            for apart in (False, True):
                result = evaluate(
                    label=f"evaluate {name}, documents {'apart' if apart else 'together'}",
                    documents=made.curated.documents,
                    tokenizer=made.curated.tokenizer,
                    checkpoint=checkpoint,
                    settings=EvaluateSettings(training_workers=0, pack_document_mask=apart, evaluation_samples=0),
                )
                scores.append(result.statistics["bits_per_byte"]["all"])
            found[name] = checkpoint, scores
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("home")
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--languages", nargs="+", default=["en"])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    home = Home.open(given.home)
    print("| model | trained | bits per byte, one text | within documents | CPU ms a step |\n|---|---|---|---|---|")
    for mask in (False, True):
        for name, (checkpoint, (together, apart)) in trained(home, given, mask).items():
            about = checkpoint.statistics
            each = 1000 * about["cpu_seconds"] / (given.steps - parameters_of(given, mask).switch_step)
            how = "within documents" if mask else "as one text"
            print(f"| {name} | {how} | {together:.4f} | {apart:.4f} | {each:.0f} |", flush=True)


if __name__ == "__main__":
    main()

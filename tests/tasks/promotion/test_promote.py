"""Promotion: the evaluations of a checkpoint by lineage, and which evaluation of the champion the gate uses."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage.champions import PROMOTED, REFUSED, champion, decisions
from eclectus.tasks.promotion.gate import Gate
from eclectus.tasks.promotion.promote import Candidate, decide, find_base, find_candidate
from eclectus.tasks.settings import Settings
from eclectus.tasks.step import step

RULES = ["bits_per_byte.en <= champion"]
DOCUMENTS = [f"{number:032x}" for number in range(20)]


class Made(Settings):
    """Settings of the steps below. bits: of every document, which has one byte."""

    name: str = ""
    bits: float = 2.0


@step(makes="checkpoint", version=1)
def train(settings: Made, out):
    out.file("weights").write_text(settings.name)


@step(makes="evaluation", version=1)
def evaluate(checkpoint: Artifact, settings: Made, out):
    columns = {
        "language": "en",
        "domain": "docs",
        "group": "original",
        "bits": settings.bits,
        "bytes": 1.0,
        "tokens": 1,
    }
    table = pa.Table.from_pylist([{"document": document, **columns} for document in DOCUMENTS])
    pq.write_table(table, out.file("documents.parquet"))
    routing = pa.schema([("layer", pa.int32()), ("expert", pa.int32())]).empty_table()
    pq.write_table(routing, out.file("routing.parquet"))
    out.file("about.json").write_text(json.dumps({"checkpoint": checkpoint.digest}))


@step(makes="evaluation", version=1)
def contamination(evaluation: Artifact, settings: Made, out):
    out.statistics = {"share": 0.25}
    out.file("of").write_text(evaluation.digest)


def candidate(name, bits, label="stage 2"):
    checkpoint = train(settings=Made(name=name))
    scored = evaluate(label=f"evaluate {label}", checkpoint=checkpoint, settings=Made(bits=bits))
    return Candidate(checkpoint, {"text": scored})


def gate(line):
    return Gate(line, "stage 2", "dense", RULES)


def test_a_candidate_is_compared_with_the_evaluation_that_the_champion_was_promoted_with(run):
    first = candidate("first", 2.0)
    assert decide(gate("a"), first, None).verdict == PROMOTED
    refused = decide(gate("a"), candidate("worse", 2.1), None)
    assert refused.verdict == REFUSED and "2.1 bits per byte in English, at most 2 required" in refused.reason
    assert champion(run.home, "a").checkpoint == first.checkpoint.digest
    better = candidate("better", 1.9)
    assert decide(gate("a"), better, None).verdict == PROMOTED
    assert champion(run.home, "a").checkpoint == better.checkpoint.digest
    assert [each.verdict for each in decisions(run.home, "a")] == [PROMOTED, REFUSED, PROMOTED]


def test_an_evaluation_of_the_champion_in_the_same_run_counts_instead(run):
    first = candidate("first", 2.0)
    decide(gate("b"), first, None)
    again = Candidate(first.checkpoint, candidate("first", 1.8).evaluations)
    decision = decide(gate("b"), candidate("between", 1.9), None, others=[again])
    assert decision.verdict == REFUSED and "1.9 bits per byte in English, at most 1.8 required" in decision.reason


def test_the_champion_itself_has_nobody_to_beat(run):
    first = candidate("first", 2.0)
    decide(gate("c"), first, None)
    again = Candidate(first.checkpoint, candidate("first", 2.5).evaluations)
    assert decide(gate("c"), again, None).rules[0]["reason"] == "there is no other champion"


def test_lineage_finds_the_latest_evaluations_of_a_checkpoint_with_its_name_and_run(run):
    old = candidate("model", 2.0, label="stage 1")
    new = candidate("model", 1.9)
    seen = contamination(evaluation=new.evaluations["text"], settings=Made())
    found, name, made_in = find_candidate(run.home, old.checkpoint)
    assert found == Candidate(old.checkpoint, {"text": new.evaluations["text"], "contamination": seen})
    assert (name, made_in) == ("stage 2", run.id)
    with pytest.raises(EclectusError, match="was never evaluated here; evaluate it on the sources of its run"):
        find_candidate(run.home, old.checkpoint, run="another-run")
    with pytest.raises(EclectusError, match="was never evaluated here"):
        find_candidate(run.home, train(settings=Made(name="fresh")))


def test_an_evaluation_that_was_reused_counts_as_the_latest(run):
    first, _ = candidate("model", 2.0), candidate("model", 1.9)
    assert candidate("model", 2.0, label="lory").evaluations == first.evaluations
    found, name, _ = find_candidate(run.home, first.checkpoint)
    assert found.evaluations == first.evaluations and name == "lory"


def test_the_base_is_the_model_of_that_name_in_the_run(run):
    dense = candidate("dense", 2.0, label="dense")
    candidate("model", 1.9)
    assert find_base(run.home, "dense", run.id) == dense
    assert find_base(run.home, "lory", run.id) is None
    assert find_base(run.home, "dense", "another-run") is None

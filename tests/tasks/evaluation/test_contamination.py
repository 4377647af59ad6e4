"""Contamination: planted leakage is found, in questions and in held-out text; what was not seen is not suspected."""

import gzip
import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from eclectus.storage.errors import EclectusError
from eclectus.tasks.evaluation.benchmark import BenchmarkSettings, benchmark
from eclectus.tasks.evaluation.contamination import ContaminationSettings, contamination
from eclectus.tasks.evaluation.evaluate import EvaluateSettings, evaluate
from eclectus.tasks.evaluation.passages import hash_grams, hash_words
from tests.support.small_world import SEGMENT, make_world, texts, write_documents

QUESTIONS = [
    {
        "goal": "mend the hem of an old winter coat at home",
        "sol1": "sew it with a short stitch",
        "sol2": "boil it",
        "label": 0,
    },
    {
        "goal": "keep bees calm while you open their hive in spring",
        "sol1": "shout",
        "sol2": "use a little cool smoke",
        "label": 1,
    },
    {"goal": "descale a kettle that whistles", "sol1": "boil vinegar in it and rinse", "sol2": "paint it", "label": 0},
]
LEAKED = "Of bees: Keep bees CALM, while you open their hive in spring!\nAnswer: use a little cool smoke. And so on."


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.set_num_threads(1)
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def leaky(world, tmp_path_factory):
    """Documents with a question and a held-out document in the training text, and the dense model's scores on them."""
    rows = texts()
    held = next(row for row in rows if row["split"] == "heldout" and row["domain"] == "docs")
    copy = f"An extract.\n{held['text']}\nThe end."
    planted = [{**rows[1], "text": LEAKED, "split": "train"}, {**rows[1], "text": copy, "split": "train"}]
    documents = write_documents(world.store, rows + planted)
    folder = tmp_path_factory.mktemp("questions")
    with gzip.open(folder / "piqa.jsonl.gz", "wt") as lines:
        lines.write("\n".join(map(json.dumps, QUESTIONS)))
    with world.store.draft("evaluation") as draft:
        settings = BenchmarkSettings(benchmark_files=[str(folder)], training_workers=0)
        benchmark.function(world.models["dense"], world.tokenizer, settings, draft)
        answers = world.store.commit(draft)
    with world.store.draft("evaluation") as draft:
        settings = EvaluateSettings(evaluation_context=SEGMENT, evaluation_samples=0, training_workers=0)
        evaluate.function(documents, world.tokenizer, world.models["dense"], settings, draft)
        evaluation = world.store.commit(draft)
    held_id = hashlib.sha256(held["text"].encode()).hexdigest()[:32]
    return SimpleNamespace(documents=documents, held=held_id, answers=answers, evaluation=evaluation)


def instances(world, documents, also=()):
    """An artifact of instances that holds every training document, and `also`."""
    from eclectus.tasks.documents.table import read_table

    table = read_table(documents, ["document", "split"]).to_pylist()
    names = [row["document"] for row in table if row["split"] == "train"] + list(also)
    with world.store.draft("instances") as draft:
        pq.write_table(pa.table({"document": names}), draft.file("documents.parquet"))
        return world.store.commit(draft)


def compare(world, leaky, packed, tasks=True):
    with world.store.draft("evaluation") as draft:
        contamination.function(
            leaky.documents,
            [leaky.documents],
            packed,
            leaky.evaluation,
            ContaminationSettings(),
            draft,
            benchmark=leaky.answers if tasks else None,
        )
        return world.store.commit(draft)


def test_planted_leakage_is_found_with_the_document_that_holds_it(world, leaky):
    found = compare(world, leaky, [instances(world, leaky.documents)])
    items = {row["item"]: row for row in pq.read_table(found.file("items.parquet")).to_pylist()}
    assert [items[f"piqa/{n}"]["seen"] for n in range(3)] == [False, True, False]
    assert items["piqa/1"]["overlap"] > 0.5 and items["piqa/0"]["overlap"] == 0
    planted = {row["document"] for row in items.values() if row["item"] == "piqa/1"}
    assert planted == {hashlib.sha256(LEAKED.encode()).hexdigest()[:32]}
    assert items[leaky.held]["overlap"] == 1 and items[leaky.held]["seen"]
    assert items[leaky.held]["passages"] == 1 and items["piqa/0"]["passages"] == 0
    scored = {row["document"]: row for row in pq.read_table(leaky.evaluation.file("documents.parquet")).to_pylist()}
    shares = {(row["kind"], row["name"]): row for row in pq.read_table(found.file("shares.parquet")).to_pylist()}
    task = shares["task", "piqa"]
    assert (task["items"], task["seen"]) == (3, 1) and task["share"] == pytest.approx(1 / 3)
    answers = pq.read_table(leaky.answers.file("items.parquet")).to_pylist()
    unseen = [row["value"] for row in answers if row["metric"] == "acc" and row["item"] != 1]
    assert task["score_unseen"] == pytest.approx(np.mean(unseen))
    assert shares["domain", "docs"]["seen"] >= 1
    unseen = [row for name, row in scored.items() if row["group"] == "original" and not items[name]["seen"]]
    expected = sum(row["bits"] for row in unseen) / sum(row["bytes"] for row in unseen)
    original = shares["group", "original"]
    assert original["score_unseen"] == pytest.approx(expected) and original["score"] != original["score_unseen"]
    passages = [items[name]["passages"] for name, row in scored.items() if row["group"] == "original"]
    assert original["mean_passages"] == pytest.approx(np.mean([each for each in passages if each is not None]))
    assert found.statistics["held_out_documents_that_were_trained_on"] == 0


def test_a_held_out_document_that_was_packed_is_named_by_its_id(world, leaky):
    scored = pq.read_table(leaky.evaluation.file("documents.parquet"))["document"].to_pylist()
    packed = [instances(world, leaky.documents, also=scored[:1])]
    about = json.loads(compare(world, leaky, packed).file("about.json").read_text())
    assert about["held_out_documents_that_were_trained_on"] == 1 and about["same"] == scored[:1]


def test_only_what_was_packed_counts_as_trained_on(world, leaky):
    with world.store.draft("instances") as draft:
        pq.write_table(pa.table({"document": ["0" * 32]}), draft.file("documents.parquet"))
        nothing = world.store.commit(draft)
    assert compare(world, leaky, [nothing], tasks=False).statistics["seen"] == 0


def test_a_model_of_unknown_training_is_an_error_that_says_so(world, leaky):
    with pytest.raises(EclectusError, match="no instances are upstream"):
        compare(world, leaky, [], tasks=False)


@pytest.mark.parametrize(
    ("text", "count"),
    [("The cat sat.", 3), ("Η γάτα, κάθισε", 3), ("猫坐在垫子上", 6), ("x_1 y-2", 4), ("", 0), ("!?", 0)],
)
def test_words_are_runs_of_letters_and_single_characters_where_no_spaces_part_them(text, count):
    assert len(hash_words(text)) == count


def test_the_same_words_in_a_row_have_the_same_hash_wherever_they_stand():
    one, two = hash_words("a b c d e f"), hash_words("zz B c, D yy")
    assert set(hash_grams(one, 3)) & set(hash_grams(two, 3)) == {hash_grams(hash_words("b c d"), 3)[0]}
    assert len(hash_grams(one, 7)) == 0
    assert hash_grams(hash_words("a b"), 2)[0] != hash_grams(hash_words("b a"), 2)[0]

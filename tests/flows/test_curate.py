"""The whole chain from files to instances, with planted duplicates, languages, budgets and broken files."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from eclectus.flows.curate import curate
from eclectus.flows.parameters import CurateParameters
from eclectus.models.training.instances import Instances
from eclectus.tasks.documents.table import read_table

SENTENCES = {
    "en": [
        "The ship left the harbour at dawn.",
        "The court heard the appeal of the owner.",
        "Rain fell on the quiet village all night.",
        "She read the letter twice before she answered.",
        "The engine failed again near the northern coast.",
        "He sold bread in the market.",
    ],
    "el": [
        "Το πλοίο έφυγε από το λιμάνι την αυγή.",
        "Το δικαστήριο άκουσε την έφεση του ιδιοκτήτη.",
        "Έβρεχε όλη τη νύχτα στο χωριό.",
        "Διάβασε το γράμμα δύο φορές πριν απαντήσει.",
        "Η μηχανή χάλασε πάλι κοντά στη βόρεια ακτή.",
        "Πουλούσε ψωμί στην αγορά.",
    ],
    "fr": [
        "Le navire a quitté le port à l'aube.",
        "Le tribunal a entendu l'appel du propriétaire.",
        "Il a plu toute la nuit sur le village.",
        "Elle a lu la lettre deux fois avant de répondre.",
        "Le moteur est tombé en panne près de la côte.",
        "Il vendait du pain au marché.",
    ],
}
COUNTS = {"en": 120, "el": 60, "fr": 15}
EXACT, NEAR = 11, 9


def documents(language, count, random):
    sentences = SENTENCES[language]
    return [
        f"{number} " + " ".join(random.choice(sentences, 14)) + f" {random.integers(10**9)}" for number in range(count)
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    rows = [text for language, count in COUNTS.items() for text in documents(language, count, random)]
    rows += rows[:EXACT]
    rows += [text + " So." for text in rows[20 : 20 + NEAR]]
    lines = [json.dumps({"text": rows[i], "domain": f"d{i % 3}"}) for i in random.permutation(len(rows))]
    (folder / "all.jsonl").write_text("\n".join(lines))
    (folder / "broken.jsonl").write_bytes(b'{"text": ""}\n{"text": 5}\n{"other": "x"}\nno json\n{"text": "\xff\xfe"}\n')
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "whole"}\n' * 400)[:-20])
    return folder


@pytest.fixture
def parameters(sources):
    return CurateParameters(
        sources=[str(sources)],
        original_languages=["en"],
        expanded_languages=["el"],
        heldout_minimum=1,
        duplicate_overlap=0.95,
        embedding_dimension=32,
        embedding_vocabulary=600,
        embedding_steps=10,
        tokenizer_vocabulary=400,
        instance_tokens=64,
    )


def test_every_record_is_kept_rejected_or_a_duplicate_and_the_counts_add_up(run, parameters):
    curated = curate.fn(parameters)
    accounts = curated.data_report.statistics["accounts"]
    planted = sum(COUNTS.values())
    assert accounts["rejected"] == curated.ingested.statistics["rejected"] >= 6
    # The archive's one text is kept once; how many of its lines could be read is not ours to say.
    whole = accounts["exact duplicates"] - EXACT
    assert accounts["records"] == planted + EXACT + NEAR + accounts["rejected"] + 1 + whole
    split = read_table(curated.documents, ["split", "language", "document"])
    assert accounts["set apart"] >= COUNTS["fr"]
    assert {"fr"} <= set(split.filter(np.array(split["split"]) == "apart")["language"].to_pylist())
    assert NEAR - 2 <= accounts["near-duplicates"] <= NEAR
    kept = [curated.original, curated.expanded]
    packed = sum(each.statistics["documents"] + each.statistics["documents_dropped"] for each in kept)
    assert packed == accounts["grouped for training"]
    heldout = set(split.filter(np.array(split["split"]) == "heldout")["document"].to_pylist())
    for instances in [*kept, curated.review]:
        assert not heldout & set(pq.read_table(instances.file("documents.parquet"))["document"].to_pylist())
        assert instances.statistics["instance_domain_purity"] <= 1


def test_the_report_shows_what_was_rejected_and_chains_and_lets_no_text_become_markup(run, parameters, sources):
    (sources / "hostile.jsonl").write_text(
        json.dumps({"text": "<script>alert(1)</script> " * 9, "domain": "<b>"}) + "\n{"
    )
    curated = curate.fn(parameters)
    page, twin = (curated.data_report.file(f"data.{suffix}").read_text() for suffix in ("html", "md"))
    for words in (
        "Where every record went",
        "Held out",
        "Rejected",
        "Chain ",
        "Near-duplicates to check",
        "wrong type",
        "Greek",
    ):
        assert words in page and words in twin
    assert "<script" not in page and "<script" not in twin and "://" not in page
    (sources / "hostile.jsonl").unlink()


def test_budgets_limit_what_is_packed_and_leave_held_out_documents_alone(run, parameters):
    free = curate.fn(parameters)
    limited = curate.fn(parameters.model_copy(update={"language_budgets": ["en=3k"]}))
    assert limited.grouping == free.grouping
    assert limited.original.statistics["tokens"] < 3600 < free.original.statistics["tokens"]
    assert limited.expanded.statistics == free.expanded.statistics
    assert limited.data_report.statistics["accounts"]["held out"] == free.data_report.statistics["accounts"]["held out"]


def test_twice_under_one_seed_is_bit_equal(home, tmp_path, parameters):
    from eclectus.storage.home import Home
    from eclectus.storage.journal import Journal
    from eclectus.storage.step_keys import KnownKeys
    from eclectus.tasks.run import Run, activate

    digests = []
    for number in range(2):
        place = Home.open(tmp_path / f"home{number}")
        with (
            Journal(place.journal, "r") as journal,
            activate(Run("r", place, journal, KnownKeys(place.keys, place.store))),
        ):
            curated = curate.fn(parameters)
            digests.append([artifact.digest for artifact in vars(curated).values()])
            assert len(Instances(curated.original.path)) > 0
    assert digests[0] == digests[1]

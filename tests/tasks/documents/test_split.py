import hashlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.split import SplitSettings, draws, split
from eclectus.tasks.documents.table import DocumentsWriter, read_table
from eclectus.tasks.packing.budget import BudgetSettings, budget
from eclectus.tasks.packing.replay import ReplaySettings, replay, review_counts
from eclectus.tasks.packing.tokenizer import TokenizerSettings, tokenizer

GROUPS = {"en": "original", "es": "original", "el": "expanded", "tr": "expanded", "fr": "other"}
WORDS = {"en": "river town ", "es": "ciudad río ", "el": "ποτάμι πόλη ", "tr": "nehir şehir ", "fr": "fleuve ville "}


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "home")


def make(store, counts, first=0):
    """Documents by (language, domain) -> how many, numbered from `first`."""
    texts, languages, domains = [], [], []
    for (language, domain), count in counts.items():
        for i in range(first, first + count):
            texts.append(f"{WORDS[language] * (1 + i % 7)}{domain} {i}")
            languages.append(language)
            domains.append(domain)
    with store.draft("documents") as out:
        with DocumentsWriter(out) as writer:
            for start in range(0, len(texts), 100):
                part = slice(start, start + 100)
                writer.write(
                    pa.table(
                        {
                            "document": [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts[part]],
                            "text": texts[part],
                            "language": languages[part],
                            "domain": domains[part],
                            "bytes": [len(text.encode()) for text in texts[part]],
                            "group": [GROUPS[language] for language in languages[part]],
                        }
                    )
                )
        return store.commit(out)


def apply(store, step, kind="documents", **arguments):
    with store.draft(kind) as out:
        step.function(**arguments, out=out)
        return store.commit(out)


def tally(documents, *names):
    return Counter(tuple(row[name] for name in names) for row in read_table(documents).to_pylist())


def splits(documents):
    return {row["document"]: row["split"] for row in read_table(documents).to_pylist()}


def test_every_large_stratum_holds_out_its_share_within_the_bounds(store):
    counts = {("en", "code"): 60, ("en", "novels"): 3000, ("el", "help"): 400, ("tr", "help"): 2000}
    settings = SplitSettings(heldout_fraction=0.05, heldout_minimum=10, heldout_maximum=50)
    documents = apply(store, split, documents=make(store, counts), settings=settings)
    held = {key[:2]: n for key, n in tally(documents, "language", "domain", "split").items() if key[2] == "heldout"}
    assert all(10 <= held[key] <= 50 for key in counts)
    assert held["en", "novels"] > 30 and documents.statistics["heldout"] == sum(held.values())
    assert documents.statistics["by_language"]["en"]["code"]["heldout"] == held["en", "code"]


def test_a_small_language_keeps_some_to_train_on_and_holds_out_one(store):
    counts = {("en", "a"): 100, ("el", "a"): 3, ("tr", "a"): 1, ("tr", "b"): 1, ("es", "a"): 1}
    documents = apply(store, split, documents=make(store, counts), settings=SplitSettings())
    found = tally(documents, "language", "split")
    assert (found["el", "train"], found["el", "heldout"]) == (2, 1)
    assert (found["tr", "train"], found["tr", "heldout"]) == (1, 1)
    assert (found["es", "train"], found["es", "heldout"]) == (1, 0)
    assert documents.statistics["without_heldout"] == ["es"]


def test_documents_of_other_languages_are_in_neither_split(store):
    documents = apply(
        store, split, documents=make(store, {("en", "a"): 100, ("fr", "a"): 100}), settings=SplitSettings()
    )
    assert tally(documents, "language", "split")["fr", "apart"] == 100
    with pytest.raises(EclectusError, match="no document is left to train on: 5 documents, 5 of them set apart"):
        apply(store, split, documents=make(store, {("fr", "a"): 5}), settings=SplitSettings())


@pytest.mark.parametrize("more", [30, 300, 3000])
def test_no_trained_document_becomes_held_out_when_documents_are_added(store, more):
    counts = {("en", "a"): 1000, ("el", "b"): 70}
    settings = SplitSettings(heldout_maximum=60)
    before = splits(apply(store, split, documents=make(store, counts), settings=settings))
    with_more = {("en", "a"): 1000 + more, ("el", "b"): 70 + more}
    after = splits(apply(store, split, documents=make(store, with_more), settings=settings))
    moved = Counter((old, after[document]) for document, old in before.items() if after[document] != old)
    assert moved["train", "heldout"] == 0
    assert more > 30 or sum(moved.values()) < 5


def test_the_seed_decides_and_decides_alone(store):
    documents = make(store, {("en", "a"): 500})
    first, again, other = (
        apply(store, split, documents=documents, settings=SplitSettings(seed=seed)) for seed in (0, 0, 1)
    )
    assert first.digest == again.digest != other.digest


def test_draws_are_uniform_and_independent_between_purposes():
    ids = [hashlib.sha256(str(i).encode()).hexdigest()[:32] for i in range(20_000)]
    one, two = draws(ids, "split", 0), draws(ids, "replay", 0)
    assert abs(one.mean() - 0.5) < 0.01 and one.min() >= 0 and one.max() < 1
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.03


def test_the_review_is_drawn_from_training_documents_only_by_count_and_seed(store):
    counts = {("en", "a"): 400, ("en", "b"): 400, ("es", "a"): 30, ("el", "a"): 300, ("tr", "a"): 300, ("fr", "a"): 9}
    documents = apply(store, split, documents=make(store, counts), settings=SplitSettings())
    settings = ReplaySettings(review_original_documents=100, review_expanded_documents=200)
    review = apply(store, replay, documents=documents, settings=settings)
    assert tally(review, "split").keys() == {("train",)}
    found = tally(review, "language")
    assert (found["en",], found["el",], found["tr",]) == (100, 200, 200)
    assert found["es",] == tally(documents, "language", "split")["es", "train"]
    assert review.statistics["languages"]["es"]["wanted"] == 100
    assert min(tally(review, "language", "domain")[("en", domain)] for domain in "ab") > 30
    assert apply(store, replay, documents=documents, settings=settings).digest == review.digest
    seeded = apply(store, replay, documents=documents, settings=settings.model_copy(update={"seed": 1}))
    assert seeded.digest != review.digest


def test_automatic_review_counts_keep_one_original_to_two_expanded():
    def counts(**available):
        by_group = {(GROUPS[language], language): n for language, n in available.items()}
        return review_counts(by_group, ReplaySettings())

    assert counts(en=10**6, es=10**6, el=10**6, tr=10**6) == {"original": 50_000, "expanded": 100_000}
    assert counts(en=10**6, el=10**6, tr=10**6) == {"original": 100_000, "expanded": 100_000}
    assert counts(en=100, el=1000, tr=20) == {"original": 100, "expanded": 100}
    assert counts(en=1000, el=1) == {"original": 1, "expanded": 1}


def test_a_review_without_original_or_expanded_documents_is_an_error(store):
    for counts, group in (({("en", "a"): 50}, "expanded"), ({("el", "a"): 50}, "original")):
        documents = apply(store, split, documents=make(store, counts), settings=SplitSettings())
        with pytest.raises(EclectusError, match=f"no document of an {group} language"):
            apply(store, replay, documents=documents, settings=ReplaySettings())


@pytest.fixture
def trained(store):
    counts = {("en", "a"): 600, ("el", "a"): 300, ("tr", "a"): 100}
    documents = apply(store, split, documents=make(store, counts), settings=SplitSettings())
    settings = TokenizerSettings(tokenizer_vocabulary=400)
    return documents, apply(store, tokenizer, "tokenizer", documents=documents, settings=settings)


def test_a_budget_limits_a_language_and_leaves_the_others(store, trained):
    documents, bpe = trained
    settings = BudgetSettings(language_budgets=["el=1k"])
    limited = apply(store, budget, documents=documents, tokenizer=bpe, settings=settings)
    before, after = tally(documents, "language", "split"), tally(limited, "language", "split")
    greek = limited.statistics["languages"]["el"]
    assert 800 < greek["tokens"] <= 1000 and 0 < after["el", "train"] < before["el", "train"]
    for key in (("en", "train"), ("tr", "train"), ("el", "heldout")):
        assert after[key] == before[key]
    assert sum(after.values()) == sum(before.values())
    larger = apply(
        store, budget, documents=documents, tokenizer=bpe, settings=BudgetSettings(language_budgets=["el=2k"])
    )
    kept, more = splits(limited), splits(larger)
    assert all(more[document] == "train" for document, state in kept.items() if state == "train")


def test_weights_set_the_shares_without_repeating(store, trained):
    documents, bpe = trained
    settings = BudgetSettings(language_weights=["en=1", "el=2", "tr=1"])
    tokens = {
        language: each["tokens"]
        for language, each in apply(store, budget, documents=documents, tokenizer=bpe, settings=settings)
        .statistics["languages"]
        .items()
    }
    assert abs(tokens["el"] / tokens["en"] - 2) < 0.1 and abs(tokens["tr"] / tokens["en"] - 1) < 0.1


def test_budgets_that_cannot_be_read_or_met_are_refused(store, trained):
    documents, bpe = trained
    for entry in ("el", "el=many", "el=0", "=5"):
        with pytest.raises(EclectusError, match="cannot be read; expected LANGUAGE=NUMBER"):
            BudgetSettings.read({"language_budgets": [entry]}, "x.yaml")
    with pytest.raises(EclectusError, match="'language_budgets' names language 'hu', which has no training tokens"):
        apply(store, budget, documents=documents, tokenizer=bpe, settings=BudgetSettings(language_budgets=["hu=5M"]))

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.split import SplitSettings, split
from eclectus.tasks.documents.table import DocumentsWriter, read_table
from eclectus.tasks.packing.replay import ReplaySettings, replay, review_counts
from tests.support.topics import GROUPS, make, numbered, tally


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "home")


def test_nothing_that_the_grouping_dropped_is_drawn(home):
    rows = [
        (f"{number:032x}", "en" if number < 10 else "el", "original" if number < 10 else "expanded")
        for number in range(20)
    ]
    columns = dict(zip(("document", "language", "group"), map(list, zip(*rows, strict=True)), strict=True))
    with home.store.draft("documents") as draft:
        with DocumentsWriter(draft) as writer:
            writer.write(pa.table({**columns, "text": ["text"] * 20, "split": ["train"] * 20}))
        documents = home.store.commit(draft)
    with home.store.draft("grouping") as draft:
        pq.write_table(pa.table({"row": pa.array([1, 3, 12, 14, 16])}), draft.file("order.parquet"))
        grouping = home.store.commit(draft)
    with home.store.draft("documents") as draft:
        replay.function(documents, ReplaySettings(), draft, grouping)
        drawn = read_table(home.store.commit(draft), ["document"])["document"].to_pylist()
    assert drawn and set(drawn) <= {columns["document"][row] for row in (1, 3, 12, 14, 16)}


def test_the_review_is_drawn_from_training_documents_only_by_count_and_seed(store):
    counts = {("en", "a"): 400, ("en", "b"): 400, ("es", "a"): 30, ("el", "a"): 300, ("tr", "a"): 300, ("fr", "a"): 9}
    documents = make(store, split, documents=numbered(store, counts), settings=SplitSettings())
    settings = ReplaySettings(review_original_documents=100, review_expanded_documents=200)
    review = make(store, replay, documents=documents, settings=settings)
    assert tally(review, "split").keys() == {("train",)}
    found = tally(review, "language")
    assert (found["en",], found["el",], found["tr",]) == (100, 200, 200)
    assert found["es",] == tally(documents, "language", "split")["es", "train"]
    assert review.statistics["languages"]["es"]["wanted"] == 100
    assert min(tally(review, "language", "domain")[("en", domain)] for domain in "ab") > 30
    assert make(store, replay, documents=documents, settings=settings).digest == review.digest
    seeded = make(store, replay, documents=documents, settings=settings.model_copy(update={"seed": 1}))
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
        documents = make(store, split, documents=numbered(store, counts), settings=SplitSettings())
        with pytest.raises(EclectusError, match=f"no document of an {group} language"):
            make(store, replay, documents=documents, settings=ReplaySettings())

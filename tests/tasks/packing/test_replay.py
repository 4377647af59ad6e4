import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.split import SplitSettings, split
from eclectus.tasks.documents.table import DocumentsWriter, read_table
from eclectus.tasks.packing.replay import ReplaySettings, Supply, replay, review_counts, spread
from eclectus.tasks.packing.text_tokens import TextTokens
from eclectus.tasks.packing.tokenizer import TokenizerSettings, load_tokenizer, tokenizer
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
    found, spanish = tally(review, "language"), tally(documents, "language", "split")["es", "train"]
    assert (found["en",], found["es",]) == (100, spanish)
    assert found["el",] == found["tr",] == 100 + spanish
    assert min(tally(review, "language", "domain")[("en", domain)] for domain in "ab") > 30
    assert make(store, replay, documents=documents, settings=settings).digest == review.digest
    seeded = make(store, replay, documents=documents, settings=settings.model_copy(update={"seed": 1}))
    assert seeded.digest != review.digest


def supply(**sizes):
    """language=(documents, tokens of each)."""
    return {
        language: Supply(GROUPS[language], np.full(documents, float(tokens)))
        for language, (documents, tokens) in sizes.items()
    }


def drawn(settings=None, **sizes):
    return review_counts(supply(**sizes), settings or ReplaySettings())


def test_with_the_papers_text_the_counts_are_the_papers():
    counts = drawn(en=(10**6, 900), es=(10**6, 900), el=(10**7, 1000), tr=(10**7, 1000))
    assert counts == {"en": 50_000, "es": 50_000, "el": 100_000, "tr": 100_000}


def test_the_originals_are_at_most_the_wanted_share_of_the_text_of_stage_1():
    for share in (0.01, 0.03):
        settings = ReplaySettings(review_original_share=share)
        counts = drawn(settings, en=(9_000, 1000), el=(2_000, 1000), tr=(500, 2000))
        assert counts["en"] == share * 3_000 and counts["el"] + counts["tr"] == 2 * counts["en"]
    uneven = {"en": Supply("original", np.array([9_000.0, 10.0])), "el": Supply("expanded", np.full(90, 10_000.0))}
    assert review_counts(uneven, ReplaySettings(review_original_share=0.01)) == {"en": 1, "el": 2}


@pytest.mark.parametrize(
    ("stage1", "original"), [(10**5, 10), (655_360, 65), (3 * 10**6, 65), (10**7, 100), (10**8, 1000)]
)
def test_by_default_the_share_is_the_papers_or_64_thousand_tokens_or_a_tenth(stage1, original):
    assert drawn(en=(9_000, 1000), el=(stage1 // 100, 100)) == {"en": original, "el": 2 * original}


def test_two_expanded_documents_are_drawn_to_an_original_one_whichever_group_has_too_few():
    many = ReplaySettings(review_original_share=1)
    assert drawn(many, en=(800, 1), el=(100, 999), tr=(20, 999)) == {"en": 60, "el": 100, "tr": 20}
    assert drawn(many, en=(30, 1), el=(1000, 9), tr=(20, 9)) == {"en": 30, "el": 40, "tr": 20}
    assert drawn(many, en=(30, 1), es=(4, 1), el=(1000, 9)) == {"en": 30, "es": 4, "el": 68}
    assert drawn(many, en=(1000, 5), el=(1, 5)) == {"en": 1, "el": 1}
    both = ReplaySettings(review_original_documents=10, review_expanded_documents=30)
    assert drawn(both, en=(99, 5), el=(99, 5)) == {"en": 10, "el": 30}
    assert drawn(both, en=(4, 5), el=(99, 5)) == {"en": 4, "el": 12}
    assert drawn(both, en=(99, 5), el=(12, 5)) == {"en": 4, "el": 12}
    assert drawn(ReplaySettings(review_expanded_documents=30), en=(99, 5), el=(99, 5)) == {"en": 15, "el": 30}
    assert drawn(ReplaySettings(review_original_documents=7), en=(99, 5), el=(99, 5)) == {"en": 7, "el": 14}


@pytest.mark.parametrize("seed", range(5))
def test_a_total_is_divided_evenly_and_nothing_of_it_is_lost(seed):
    random = np.random.default_rng(seed)
    most = {str(number): int(size) for number, size in enumerate(random.integers(0, 50, 6))}
    for total in range(sum(most.values()) + 3):
        counts = spread(most, total)
        assert sum(counts.values()) == min(total, sum(most.values()))
        free = [count for language, count in counts.items() if count < most[language]]
        assert all(count <= most[language] for language, count in counts.items())
        assert not free or max(counts.values()) - min(free) <= 1


def test_a_corpus_that_is_too_small_for_the_share_says_so_and_tokens_are_those_of_the_tokenizer(store, monkeypatch):
    messages = []
    monkeypatch.setattr("eclectus.tasks.packing.replay.notify", lambda name, text: messages.append(text))
    counts = {("en", "a"): 300, ("el", "a"): 300}
    documents = make(store, split, documents=numbered(store, counts), settings=SplitSettings())
    bpe = make(store, tokenizer, documents=documents, settings=TokenizerSettings(tokenizer_vocabulary=300))
    review = make(store, replay, documents=documents, tokenizer=bpe, settings=ReplaySettings())
    statistics = review.statistics
    assert "more than the paper's 1%" in messages[0] and "1:2;" in messages[0]
    assert statistics["expanded_documents"] in (2 * statistics["original_documents"], sum(counts.values()) // 2)
    texts = read_table(review, ["text", "group"]).to_pylist()
    encode = TextTokens(load_tokenizer(bpe.path))
    for group in ("original", "expanded"):
        exact = sum(len(ids) + 1 for ids in encode([row["text"] for row in texts if row["group"] == group]))
        assert statistics[f"{group}_tokens"] == pytest.approx(exact, rel=0.05)
    assert statistics["share_of_stage1"] == pytest.approx(
        statistics["original_tokens"] / statistics["stage1_tokens"], rel=1e-3
    )
    assert sum(each["documents"] for each in statistics["languages"].values()) == len(texts)


def test_a_review_without_original_or_expanded_documents_is_an_error(store):
    for counts, group in (({("en", "a"): 50}, "expanded"), ({("el", "a"): 50}, "original")):
        documents = make(store, split, documents=numbered(store, counts), settings=SplitSettings())
        with pytest.raises(EclectusError, match=f"no document of an {group} language"):
            make(store, replay, documents=documents, settings=ReplaySettings())

import pytest
from pydantic import ValidationError

from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.split import SplitSettings, split
from eclectus.tasks.documents.table import read_table
from eclectus.tasks.packing.budget import BudgetSettings, amounts, budget, limits_of
from eclectus.tasks.packing.replay import ReplaySettings, replay
from eclectus.tasks.packing.tokenizer import TokenizerSettings, tokenizer
from tests.support.topics import in_parts, make, numbered, splits, tally


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ArtifactStore(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def trained(store):
    counts = {("en", "a"): 600, ("el", "a"): 300, ("tr", "a"): 100}
    documents = make(store, split, documents=numbered(store, counts), settings=SplitSettings())
    settings = TokenizerSettings(tokenizer_vocabulary=400)
    return documents, make(store, tokenizer, documents=documents, settings=settings)


def test_a_budget_limits_a_language_and_leaves_the_others(store, trained):
    documents, bpe = trained
    settings = BudgetSettings(language_budgets=["el=1k"])
    limited = make(store, budget, documents=documents, tokenizer=bpe, settings=settings)
    before, after = tally(documents, "language", "split"), tally(limited, "language", "split")
    greek = limited.statistics["languages"]["el"]
    assert 800 < greek["tokens"] <= 1000 and 0 < after["el", "train"] < before["el", "train"]
    for key in (("en", "train"), ("tr", "train"), ("el", "heldout")):
        assert after[key] == before[key]
    assert sum(after.values()) == sum(before.values())
    larger = make(
        store, budget, documents=documents, tokenizer=bpe, settings=BudgetSettings(language_budgets=["el=2k"])
    )
    kept, more = splits(limited), splits(larger)
    assert all(more[document] == "train" for document, state in kept.items() if state == "train")


def test_weights_set_the_shares_without_repeating(store, trained):
    documents, bpe = trained
    settings = BudgetSettings(language_weights=["en=1", "el=2", "tr=1"])
    tokens = {
        language: each["tokens"]
        for language, each in make(store, budget, documents=documents, tokenizer=bpe, settings=settings)
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
        make(store, budget, documents=documents, tokenizer=bpe, settings=BudgetSettings(language_budgets=["hu=5M"]))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], {}),
        (["el=5M"], {"el": 5e6}),
        (["Chinese (Simplified)=1M", "Norwegian Bokmål = 2k"], {"zh": 1e6, "no": 2e3}),
        (["ell_Grek=1.5k", "en = 2", "zh-cn=3B", "ceb=1G"], {"el": 1500.0, "en": 2.0, "zh": 3e9, "ceb": 1e9}),
    ],
)
def test_amounts_name_a_language_in_any_form_and_a_number_with_a_unit(entries, expected):
    assert amounts(entries) == expected


def test_a_language_that_is_given_twice_is_refused_in_any_form():
    for entries in (["el=1", "el=2"], ["el=1", "Greek=2"], ["zh=1M", "cmn=1M"]):
        with pytest.raises(ValidationError, match="is given twice"):
            BudgetSettings(language_budgets=entries)


def test_the_scarcest_language_for_its_weight_sets_the_scale_and_a_budget_counts_as_its_supply():
    available = {"en": 1000.0, "el": 300.0, "tr": 500.0}
    weights = BudgetSettings(language_weights=["en=1", "el=2"])
    assert limits_of(available, weights) == {"en": 150.0, "el": 300.0}
    both = BudgetSettings(language_weights=["en=1", "el=2"], language_budgets=["en=100", "tr=400"])
    assert limits_of(available, both) == {"en": 100.0, "el": 200.0, "tr": 400.0}
    assert limits_of(available, BudgetSettings()) == {}


def test_a_budget_of_hardly_anything_keeps_one_document(store, trained):
    documents, bpe = trained
    limited = make(
        store, budget, documents=documents, tokenizer=bpe, settings=BudgetSettings(language_budgets=["el=1"])
    )
    assert limited.statistics["languages"]["el"]["documents"] == 1
    assert tally(limited, "language", "split")["el", "train"] == 1


def test_parts_change_neither_a_budget_nor_a_review_and_near_duplicates_stay_with_the_documents(store, trained):
    documents, bpe = trained
    parts = in_parts(store, documents, 130, 700)
    budgets = BudgetSettings(language_budgets=["el=2k"], language_weights=["en=1", "tr=1"])
    limited, of_parts = (
        make(store, budget, documents=each, tokenizer=bpe, settings=budgets) for each in (documents, parts)
    )
    assert splits(limited) == splits(of_parts) and limited.statistics == of_parts.statistics
    for each in (limited, of_parts):
        assert (
            each.file("near_duplicates.parquet").read_bytes() == documents.file("near_duplicates.parquet").read_bytes()
        )
    drawn = [
        make(store, replay, documents=each, settings=ReplaySettings(review_expanded_documents=40), tokenizer=bpe)
        for each in (limited, of_parts)
    ]
    one, other = (read_table(each).to_pylist() for each in drawn)
    assert one == other and len(one) > 60 and drawn[0].statistics == drawn[1].statistics

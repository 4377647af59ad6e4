"""New documents: what counts as new, when it suffices to train, and what a retraining reads of what is known."""

import pyarrow as pa
import pytest

from eclectus.tasks.documents.table import DocumentsWriter, read_table
from eclectus.tasks.packing.tokenizer import TokenizerSettings, load_tokenizer, tokenizer
from eclectus.tasks.promotion.new_documents import (
    NewDocumentsSettings,
    RefreshSettings,
    decide,
    known_ids,
    news,
    refresh,
)

GROUPS = {"en": "original", "el": "expanded", "tr": "expanded", "fr": "other"}


def documents(home, *kinds):
    """An artifact of documents. kinds: (language, split, numbers); a document's number is its id."""
    rows = [
        {
            "document": f"{number:032x}",
            "language": language,
            "group": GROUPS[language],
            "split": split,
            "text": f"{language} text number {number}, with a few words",
            "bytes": 33,
        }
        for language, split, numbers in kinds
        for number in numbers
    ]
    with home.store.draft("documents") as draft:
        with DocumentsWriter(draft) as writer:
            writer.write(pa.Table.from_pylist(rows))
        return home.store.commit(draft)


def made(home, kind, step, *arguments, **more):
    with home.store.draft(kind) as draft:
        step.function(*arguments, draft, **more)
        return home.store.commit(draft)


@pytest.mark.parametrize(
    ("documents", "tokens", "languages", "trains"),
    [
        (200, 50_000, [], True),
        (199, 50_000, [], False),
        (200, 49_999, [], False),
        (0, 0, [], False),
        (1, 1, ["el"], True),
    ],
)
def test_documents_and_tokens_must_both_be_met_or_a_language_be_new(documents, tokens, languages, trains):
    counts = {"el": documents} if documents else {}
    assert decide(counts, tokens, languages, NewDocumentsSettings(), trained_before=True)["train"] is trains


def test_new_languages_trigger_nothing_where_that_is_switched_off():
    settings = NewDocumentsSettings(retrain_languages=0)
    assert decide({"el": 1}, 1, ["el"], settings, trained_before=True)["train"] is False


def test_training_documents_of_wanted_languages_that_were_never_packed_are_new(home):
    seen = documents(home, ("en", "train", range(10)), ("tr", "train", range(10, 20)), ("tr", "apart", range(20, 25)))
    now = documents(
        home,
        ("en", "train", range(12)),
        ("tr", "train", range(12, 30)),
        ("el", "heldout", range(30, 35)),
        ("fr", "train", range(35, 40)),
    )
    words = made(home, "tokenizer", tokenizer, now, TokenizerSettings(tokenizer_vocabulary=300))
    settings = NewDocumentsSettings(retrain_documents=7, retrain_tokens=1)
    found = made(home, "report", news, now, settings, seen=[seen], model=words).statistics
    # 10 and 11 were seen as Turkish: ids are hashes of texts. 20 to 24 were seen, though excluded from that training.
    assert found["by_language"] == {"tr": 5} and found["new_languages"] == []
    ids = load_tokenizer(words.path)([f"tr text number {number}, with a few words" for number in range(25, 30)])
    assert found["new_tokens"] == sum(map(len, ids["input_ids"]))
    assert found["train"] is False and found["reason"] == "not enough is new: 5 of 7 documents"


def test_the_first_model_of_a_line_is_trained_whatever_there_is(home):
    found = made(home, "report", news, documents(home, ("el", "train", range(2))), NewDocumentsSettings()).statistics
    assert found["train"] is True and found["reason"] == "nothing was trained for this line yet"
    assert found["new_languages"] == ["el"]


def splits(artifact):
    table = read_table(artifact, ["document", "split"])
    return dict(zip(table["document"].to_pylist(), table["split"].to_pylist(), strict=True))


def test_known_documents_of_expanded_languages_are_excluded_but_for_a_share_of_the_new(home):
    now = documents(home, ("en", "train", range(10)), ("tr", "train", range(10, 34)), ("tr", "heldout", range(34, 36)))
    seen = documents(home, ("en", "train", range(10)), ("tr", "train", range(10, 30)))
    again = made(home, "documents", refresh, now, RefreshSettings(retrain_replay=0.5), seen=[seen])
    assert again.statistics == {"new": 4, "read_again": 2, "set_apart": 18}
    before, after = splits(now), splits(again)
    changed = {document for document in before if after[document] != before[document]}
    assert {after[document] for document in changed} == {"apart"}
    assert changed < {f"{number:032x}" for number in range(10, 30)} and len(changed) == 18
    assert splits(made(home, "documents", refresh, now, RefreshSettings(retrain_replay=0.5), seen=[seen])) == after
    other = made(home, "documents", refresh, now, RefreshSettings(retrain_replay=0.5, seed=1), seen=[seen])
    assert splits(other) != after


def test_all_known_documents_stay_where_no_document_of_an_expanded_language_is_new(home):
    now = documents(home, ("en", "train", range(10)), ("tr", "train", range(10, 20)))
    again = made(home, "documents", refresh, now, RefreshSettings(), seen=[now])
    assert again.statistics == {"new": 0, "read_again": 10, "set_apart": 0} and splits(again) == splits(now)


def test_documents_that_a_budget_excluded_are_known_and_those_of_other_languages_are_not(home):
    seen = documents(home, ("tr", "apart", range(3)), ("el", "heldout", range(3, 5)), ("fr", "train", range(5, 9)))
    assert known_ids([seen]).tobytes() == b"".join(number.to_bytes(16, "big") for number in range(5))

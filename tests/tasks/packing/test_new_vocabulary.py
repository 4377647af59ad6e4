"""A base's tokenizer gets tokens for new languages, and no original document gets other ids."""

import json

import pytest

from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.table import read_table
from eclectus.tasks.packing.text_tokens import TextTokens
from eclectus.tasks.packing.tokenizer import load_tokenizer
from tests.support import tokenizers
from tests.support.new_words import ROWS, extend_words, make, make_english, make_new_words
from tests.support.small_world import write_documents


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_new_words(tmp_path_factory.mktemp("words"))


def texts_of(documents, group):
    return read_table(documents, ["text"], (("group", "==", group),))["text"].to_pylist()


def encoders(world, extended):
    return TextTokens(load_tokenizer(world.tokenizer.path)), TextTokens(load_tokenizer(extended.path))


@pytest.mark.parametrize("merges", ["letters", "corpus"])
def test_every_original_document_keeps_its_ids_and_new_languages_need_fewer(world, merges):
    extended = extend_words(
        world.store, world.documents, world.base, world.tokenizer, extension_vocabulary_merges=merges
    )
    before, after = encoders(world, extended)
    original = texts_of(world.documents, "original")
    assert before(original) == after(original)
    greek = texts_of(world.documents, "expanded")
    sizes = [sum(map(len, encode(greek))) for encode in (before, after)]
    assert sizes[1] < 0.8 * sizes[0]
    statistics = extended.statistics
    assert statistics["original_documents"] == len(original) and statistics["new_tokens"] == 60
    was, now = statistics["bytes_per_token"]["el"]
    assert now > 1.2 * was and statistics["bytes_per_token"]["en"][0] == statistics["bytes_per_token"]["en"][1]
    text = greek[0]
    tokens = load_tokenizer(extended.path)
    assert tokens.decode(tokens(text).input_ids) == text


def test_new_ids_come_behind_the_rows_of_the_model_and_special_tokens_keep_theirs(world):
    old, new = load_tokenizer(world.tokenizer.path), load_tokenizer(world.extended.path)
    rows = len(old) + ROWS
    assert {token: number for token, number in new.get_vocab().items() if number < len(old)} == old.get_vocab()
    assert new.eos_token_id == old.eos_token_id and new.bos_token_id == old.bos_token_id
    made = json.loads(world.extended.file("new_tokens.json").read_text())
    assert made["first"] == rows and len(made["pieces"]) == 60
    assert sorted(new.get_vocab().values()) == list(range(rows + 60))
    for number, pieces in enumerate(made["pieces"], rows):
        spelled = "".join(old.convert_ids_to_tokens(pieces))
        assert new.convert_ids_to_tokens(number) == spelled


def test_a_merge_that_would_change_an_original_text_is_left_out_with_what_is_built_on_it(tmp_path):
    store, documents, base, words = make_english(tmp_path, "mistral")
    rows = read_table(documents).to_pylist()
    words_of = [word for row in rows if row["language"] == "el" for word in row["text"].split() if len(word) > 9]
    # An English document that quotes a Greek word.
    quoted = {"language": "en", "domain": "docs", "group": "original", "split": "heldout", "text": words_of[0]}
    keys = ("language", "domain", "group", "split", "text")
    more = write_documents(store, [quoted, *({key: row[key] for key in keys} for row in rows)])
    plain = extend_words(store, documents, base, words, extension_vocabulary_merges="corpus")
    careful = extend_words(store, more, base, words, extension_vocabulary_merges="corpus")
    before = TextTokens(load_tokenizer(words.path))([words_of[0]])
    assert TextTokens(load_tokenizer(careful.path))([words_of[0]]) == before
    assert TextTokens(load_tokenizer(plain.path))([words_of[0]]) != before
    left_out = [each.statistics["merges_left_out"].get("stands in an original text", 0) for each in (plain, careful)]
    assert left_out[0] < left_out[1] and careful.statistics["new_tokens"] > 0


def test_a_tokenizer_that_takes_whole_words_from_its_vocabulary_is_extended_safely(tmp_path):
    """As Llama 3's (ignore_merges): a new token that is a whole word of an original text would be taken for it."""
    store, documents, base, words = make_english(tmp_path, "llama")
    tokenizers.change(words.file("tokenizer.json"), lambda data: data["model"].update(ignore_merges=True))
    extended = extend_words(store, documents, base, words, extension_vocabulary_merges="corpus")
    before, after = (TextTokens(load_tokenizer(each.path)) for each in (words, extended))
    original = texts_of(documents, "original")
    assert before(original) == after(original) and extended.statistics["new_tokens"] > 0


def test_where_there_is_nothing_to_gain_nothing_is_appended(world):
    rows = [
        dict(row) for row in read_table(world.documents, ["language", "domain", "group", "split", "text"]).to_pylist()
    ]
    english = [row for row in rows if row["language"] == "en"]
    # "New" text in the letters that the base knows.
    same = [row | {"language": "af", "group": "expanded", "text": row["text"][::-1]} for row in english]
    documents = write_documents(world.store, english + same)
    extended = extend_words(world.store, documents, world.base, world.tokenizer)
    assert extended.statistics["new_tokens"] == 0 and extended.statistics["nothing_to_gain"] == ["af"]
    old, new = (load_tokenizer(each.path).get_vocab() for each in (world.tokenizer, extended))
    assert old == new
    assert json.loads(extended.file("new_tokens.json").read_text())["pieces"] == []


def test_the_result_is_a_function_of_its_inputs(world):
    again = extend_words(world.store, world.documents, world.base, world.tokenizer)
    assert again.digest == world.extended.digest
    more = extend_words(world.store, world.documents, world.base, world.tokenizer, count=30)
    assert more.digest != again.digest and more.statistics["new_tokens"] == 30


@pytest.mark.parametrize(
    "kind, named", [(tokenizers.unigram, "SentencePiece unigram"), (tokenizers.llama, "characters")]
)
def test_another_kind_of_tokenizer_is_refused_in_one_line(world, tmp_path, kind, named):
    from eclectus.tasks.packing.tokenizer import TokenizerSettings, tokenizer

    folder = kind(tmp_path / "given")
    given = make(world.store, "tokenizer", tokenizer, documents=None, settings=TokenizerSettings(tokenizer=str(folder)))
    with pytest.raises(EclectusError, match=f"{named}.*set extension_vocabulary to 0") as error:
        extend_words(world.store, world.documents, world.base, given)
    assert "\n" not in str(error.value)


def test_without_text_of_a_new_language_there_is_nothing_to_learn_from(world):
    english = [
        row
        for row in read_table(world.documents, ["language", "domain", "group", "split", "text"]).to_pylist()
        if row["language"] == "en"
    ]
    documents = write_documents(world.store, english)
    with pytest.raises(EclectusError, match="no training document of an expanded language"):
        extend_words(world.store, documents, world.base, world.tokenizer)

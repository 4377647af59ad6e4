"""Which tokenizer a run uses, and what begins and ends its documents in packing and evaluation."""

import json

import numpy as np
import pytest

from eclectus.models.training.instances import Instances
from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.table import read_table
from eclectus.tasks.packing.budget import BudgetSettings, bytes_per_token
from eclectus.tasks.packing.pack import PackSettings, pack
from eclectus.tasks.packing.text_tokens import token_ids
from eclectus.tasks.packing.tokenizer import BEGIN_FILE, TokenizerSettings, fingerprint, load_tokenizer, tokenizer
from tests.support.tokenizers import byte_level, change, llama, word_piece, words
from tests.support.topics import make, write_documents

TEXTS = [f"an html page {number} " * (3 + 5 * number) for number in range(9)]
LENGTH = 16


def bos(folder):
    return byte_level(folder, "<s> $A")


def both(folder):
    return byte_level(folder, "<s> $A </s>")


def plain(folder):
    return byte_level(folder)


def taken(store, folder):
    """The step's artifact for the tokenizer in a folder."""
    return make(store, tokenizer, documents=None, settings=TokenizerSettings(tokenizer=str(folder)))


def packed(tmp_path, kind, rule="auto"):
    """(documents, tokenizer, instances)."""
    store = ArtifactStore(tmp_path / "store")
    documents = write_documents(store, [{"text": text, "language": "en", "group": "original"} for text in TEXTS])
    chosen = taken(store, kind(tmp_path / "tokenizer"))
    settings = PackSettings(instance_tokens=LENGTH, pack_remainder="pad", begin_of_document=rule)
    return documents, chosen, make(store, pack, documents=documents, tokenizer=chosen, settings=settings)


def stream(instances):
    """The tokens of every document in its order, of all its parts, padding left out."""
    import pyarrow.parquet as pq

    tokens = Instances(instances.path).tokens
    parts: dict[str, list[tuple[int, list[int]]]] = {}
    for row in pq.read_table(instances.file("documents.parquet")).to_pylist():
        here = tokens[row["instance"], row["instance_offset"] : row["instance_offset"] + row["tokens"]]
        parts.setdefault(row["document"], []).append((row["document_offset"], here.tolist()))
    return {name: [each for _, part in sorted(of) for each in part] for name, of in parts.items()}


@pytest.mark.parametrize(
    ("kind", "rule", "begin"),
    [
        (bos, "auto", [300]),
        (bos, "always", [300]),
        (bos, "never", []),
        (both, "auto", [300]),
        (llama, "auto", [1]),
        (word_piece, "auto", [2]),
        (plain, "auto", []),
        (plain, "always", [300]),
        (plain, "never", []),
    ],
)
def test_every_document_begins_as_its_tokenizer_says_and_ends_once(kind, rule, begin, tmp_path):
    documents, chosen, instances = packed(tmp_path, kind, rule)
    own = load_tokenizer(chosen.path)
    table = read_table(documents, ["document", "text"])
    expected = {
        name: [*begin, *own(text, add_special_tokens=False)["input_ids"], own.eos_token_id]
        for name, text in zip(table["document"].to_pylist(), table["text"].to_pylist(), strict=True)
    }
    assert stream(instances) == expected
    if rule == "auto" and kind is not word_piece:
        whole = [own(text)["input_ids"] for text in TEXTS]
        assert sorted(stream(instances).values()) == sorted(
            each if each[-1] == own.eos_token_id else [*each, own.eos_token_id] for each in whole
        )
    about = json.loads(instances.file("instances.json").read_text())
    assert about.get("begin_of_document", []) == begin
    settings = BudgetSettings(begin_of_document=rule)
    size = sum(map(len, TEXTS)) / sum(map(len, expected.values()))
    assert bytes_per_token(documents, own, settings) == pytest.approx({"en": size})


def test_only_a_tokenizer_that_begins_texts_gets_another_digest_and_only_a_rule_another_key(tmp_path):
    store = ArtifactStore(tmp_path / "store")
    assert json.loads(taken(store, bos(tmp_path / "bos")).file(BEGIN_FILE).read_text()) == {
        "ids": [300],
        "tokens": ["<s>"],
    }
    assert not taken(store, plain(tmp_path / "plain")).file(BEGIN_FILE).exists()
    assert "begin_of_document" not in PackSettings().key_values()
    assert PackSettings(begin_of_document="never").key_values()["begin_of_document"] == "never"


def test_always_needs_a_token_to_begin_with(tmp_path):
    with pytest.raises(EclectusError, match=r"begin_of_document is always.*no beginning-of-sequence token"):
        packed(tmp_path, words, "always")


def test_ids_beyond_the_number_of_tokens_are_packed_as_they_are(tmp_path):
    ids = {"[UNK]": 0, "</s>": 1, "an": 2, "html": 70_000, "page": 65_536}
    _, chosen, instances = packed(tmp_path, lambda folder: words(folder, ids))
    tokens = Instances(instances.path)
    assert tokens.vocabulary == chosen.statistics["vocabulary"] == 70_001
    assert tokens.tokens.dtype == np.uint32 and tokens.largest_token() == 70_000
    assert sorted(np.unique(tokens.tokens)) == [0, 1, 2, 65_536, 70_000]


def test_the_largest_id_decides_the_width_also_at_its_border(tmp_path):
    for largest, kind in ((65_535, np.uint16), (65_536, np.uint32)):
        ids = {"[UNK]": 0, "</s>": 1, "an": 2, "html": largest}
        _, _, instances = packed(tmp_path / str(largest), lambda folder, ids=ids: words(folder, ids))
        assert Instances(instances.path).tokens.dtype == kind


def test_the_content_of_a_folder_is_in_the_key(tmp_path):
    folder = words(tmp_path / "t")
    settings = TokenizerSettings(tokenizer=str(folder))
    before = tokenizer.record({"documents": None, "settings": settings}).key
    (folder / "notes.md").write_text("nothing of the tokenizer")
    assert tokenizer.record({"documents": None, "settings": settings}).key == before
    change(folder / "tokenizer.json", lambda v: v["model"]["vocab"].update(river=5))
    after = tokenizer.record({"documents": None, "settings": settings}).key
    assert after != before
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer.record({"documents": None, "settings": settings}).key != after
    assert fingerprint(TokenizerSettings()) == {}


def test_a_folder_that_changes_while_it_is_read_is_not_taken(tmp_path, monkeypatch):
    folder = words(tmp_path / "t")

    def read(path):
        result = load_tokenizer(path)
        change(folder / "tokenizer.json", lambda v: v["model"]["vocab"].update(river=5))
        return result

    monkeypatch.setattr("eclectus.tasks.packing.tokenizer.load_tokenizer", read)
    with pytest.raises(EclectusError, match="changed while it was read"):
        taken(ArtifactStore(tmp_path / "store"), folder)


@pytest.mark.parametrize("kind", [bos, both, llama, plain, word_piece, words])
def test_what_is_saved_reads_texts_as_the_original_does(kind, tmp_path):
    folder = kind(tmp_path / "t")
    saved = load_tokenizer(taken(ArtifactStore(tmp_path / "store"), folder).path)
    assert token_ids(saved, TEXTS) == token_ids(load_tokenizer(folder), TEXTS)
    assert saved("an html")["input_ids"] == load_tokenizer(folder)("an html")["input_ids"]


def test_a_setting_that_names_no_tokenizer_is_one_line(tmp_path):
    store = ArtifactStore(tmp_path / "store")
    (tmp_path / "empty").mkdir()
    for name, message in (
        (str(tmp_path / "nowhere"), "is no folder"),
        (str(tmp_path / "empty"), "holds no tokenizer"),
        ("./nowhere", "is no folder"),
    ):
        with pytest.raises(EclectusError, match=f"setting 'tokenizer' is '{name}'.*{message}") as caught:
            taken(store, name)
        assert "\n" not in str(caught.value)

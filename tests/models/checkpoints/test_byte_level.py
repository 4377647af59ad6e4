"""Tokens are appended behind all others and taken away again; what cannot be extended is refused by its name."""

import json

import pytest
from tokenizers import Tokenizer

from eclectus.models.checkpoints.byte_level import append_merges, byte_alphabet, check_byte_level, cut_vocabulary
from eclectus.models.checkpoints.tokenizer_files import open_tokenizer
from eclectus.models.checkpoints.tokenizer_json import check_tokenizer_json, read_json
from tests.support import tokenizers

TEXTS = ["the river town", "ποτάμι", "<s>", "naïve café and 3.14", "  two  spaces\n", "an html page</s>"]


def ids(data, texts=TEXTS):
    raw = Tokenizer.from_str(json.dumps(data))
    return [raw.encode(text, add_special_tokens=False).ids for text in texts]


def test_the_alphabet_is_that_of_the_library():
    from tokenizers.pre_tokenizers import ByteLevel

    table = byte_alphabet()
    assert sorted(table) == sorted(ByteLevel.alphabet()) and sorted(table.values()) == list(range(256))
    cut = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("aé ξ\n中")
    assert bytes(table[each] for each in cut[0][0]) == "aé ξ\n中".encode()


@pytest.mark.parametrize("as_text", [False, True])
def test_appended_tokens_come_behind_all_ids_and_leave_other_ids_alone(tmp_path, as_text):
    data = read_json(tokenizers.byte_level(tmp_path) / "tokenizer.json")
    if as_text:
        data["model"]["merges"] = [" ".join(each) for each in data["model"]["merges"]]
    # As in Llama 3 and Qwen: a special token that is not in the vocabulary.
    last = max(data["model"]["vocab"].values())
    data["added_tokens"].append({**data["added_tokens"][0], "id": last + 1 if last > 301 else 302, "content": "<pad>"})
    for token in ("<s>", "</s>"):
        data["model"]["vocab"].pop(token, None)
    before = ids(data, [*TEXTS, "a<pad>b"])
    longer = append_merges(data, [("q", "z"), ("qz", "q")], 310)
    assert ids(longer, [*TEXTS, "a<pad>b"]) == before
    assert ids(longer, ["qzq", "qz"]) == [[311], [310]]
    assert sorted(longer["model"]["vocab"].values()) == list(range(312))
    check_tokenizer_json(tmp_path / "tokenizer.json", longer)
    assert type(longer["model"]["merges"][-1]) is (str if as_text else list)
    (tmp_path / "tokenizer.json").write_text(json.dumps(longer))
    assert open_tokenizer(tmp_path).get_vocab()["qzq"] == 311


def test_what_was_appended_can_be_cut_again(tmp_path):
    data = read_json(tokenizers.byte_level(tmp_path) / "tokenizer.json")
    longer = append_merges(append_merges(data, [("q", "z")], 320), [("qz", "q")], 321)
    cut = cut_vocabulary(longer, 320)
    assert cut["model"]["merges"] == data["model"]["merges"]
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    assert cut["model"]["vocab"] == data["model"]["vocab"] | added and ids(cut) == ids(data)


@pytest.mark.parametrize("first, merges", [(5, [("a", "b")]), (400, [("t", "h"), ("t", "h")])])
def test_ids_and_tokens_that_are_taken_are_refused(tmp_path, first, merges):
    data = read_json(tokenizers.byte_level(tmp_path) / "tokenizer.json")
    with pytest.raises(ValueError, match=r"taken|already"):
        append_merges(data, merges, first)


@pytest.mark.parametrize(
    "make, named",
    [
        (tokenizers.unigram, "SentencePiece unigram.*scores"),
        (tokenizers.llama, "BPE over characters"),
        (tokenizers.words, "WordLevel.*no merges"),
        (tokenizers.word_piece, "WordPiece.*no merges"),
    ],
)
def test_other_kinds_are_refused_by_name_with_the_reason(tmp_path, make, named):
    path = make(tmp_path) / "tokenizer.json"
    with pytest.raises(ValueError, match=f"{named}.*set extension_vocabulary to 0"):
        check_byte_level(path, read_json(path))


@pytest.mark.parametrize("field, value", [("dropout", 0.1), ("end_of_word_suffix", "</w>")])
def test_a_byte_level_one_that_merges_otherwise_is_refused(tmp_path, field, value):
    path = tokenizers.byte_level(tmp_path) / "tokenizer.json"
    data = read_json(path)
    check_byte_level(path, data)
    data["model"][field] = value
    with pytest.raises(ValueError, match="cannot be extended"):
        check_byte_level(path, data)

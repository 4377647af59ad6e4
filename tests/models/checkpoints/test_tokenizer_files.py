"""The door for tokenizers: what is damaged is one line that names the file, or is read as it was."""

import json
import logging
import random
import shutil

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizer

from eclectus.models.checkpoints import tokenizer_files
from eclectus.models.checkpoints.tokenizer_files import (
    PROBES,
    check_tokenizer,
    open_tokenizer,
    text_frame,
    usable_size,
    vocabulary_size,
)
from eclectus.models.checkpoints.tokenizer_json import TokenizerError
from eclectus.storage.errors import EclectusError
from eclectus.tasks.packing.tokenizer import load_tokenizer
from tests.support.tokenizers import byte_level, change, llama, sentence_piece, unigram, word_piece, words

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
TOKEN = {"content": "<new>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
PAD = TOKEN | {"id": 5, "content": "[PAD]", "special": True}


def in_file(edit):
    return FILE, lambda folder: change(folder / FILE, edit)


def in_config(edit):
    return CONFIG, lambda folder: change(folder / CONFIG, edit)


def write(name, text):
    return name, lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def cut(name, size):
    return name, lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


# Name: (kind of tokenizer, (file in the message, damage), what the message says besides).
DAMAGE = {
    "empty": (words, write(FILE, ""), "not JSON"),
    "cut short": (words, cut(FILE, 300), "not JSON"),
    "a pointer of Git LFS": (
        words,
        write(FILE, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "not JSON",
    ),
    "a page of HTML": (words, write(FILE, "<!doctype html><p>404"), "not JSON"),
    "not UTF-8": (words, write(FILE, b'{"model": "\xff\xfe"}'), "not JSON"),
    "a list": (words, write(FILE, "[]"), "not an object"),
    "deeply nested": (words, write(FILE, "[" * 100_000), "not JSON"),
    "no model": (words, in_file(lambda v: v.pop("model")), "lacks 'model'"),
    "model is text": (words, in_file(lambda v: v.update(model="BPE")), 'model is "BPE"'),
    "unknown model": (words, in_file(lambda v: v["model"].update(type="Trie")), 'model.type is "Trie"'),
    "no pre_tokenizer": (words, in_file(lambda v: v.pop("pre_tokenizer")), "lacks 'pre_tokenizer'"),
    "no normalizer": (byte_level, in_file(lambda v: v.pop("normalizer")), "lacks 'normalizer'"),
    "unknown pre_tokenizer": (words, in_file(lambda v: v["pre_tokenizer"].update(type="Magic")), "PreTokenizer"),
    "unknown version": (words, in_file(lambda v: v.update(version="9.9")), "version '9.9'"),
    "two tokens of one id": (words, in_file(lambda v: v["model"]["vocab"].update(html=2)), "the same id 2"),
    "negative id": (words, in_file(lambda v: v["model"]["vocab"].update(html=-1)), "the id -1"),
    "id is text": (words, in_file(lambda v: v["model"]["vocab"].update(html="3")), 'the id "3"'),
    "id is a fraction": (words, in_file(lambda v: v["model"]["vocab"].update(html=1.5)), "the id 1.5"),
    "huge id": (words, in_file(lambda v: v["model"]["vocab"].update(html=2**40)), "the id 1099511627776"),
    "no vocabulary": (words, in_file(lambda v: v["model"].pop("vocab")), "model.vocab is null"),
    "vocabulary is a list": (byte_level, in_file(lambda v: v["model"].update(vocab=[["a", 0]])), "model.vocab is"),
    "unknown token is missing": (words, in_file(lambda v: v["model"].update(unk_token="nope")), "UNK"),
    "merge of a missing token": (byte_level, in_file(lambda v: v["model"]["merges"].append(["a", "q§"])), "'q§'"),
    "merge without result": (byte_level, in_file(lambda v: v["model"]["merges"].append(["q", "q"])), "'qq'"),
    "merge of one": (byte_level, in_file(lambda v: v["model"]["merges"].append("abc")), "two tokens"),
    "no merges": (byte_level, in_file(lambda v: v["model"].pop("merges")), "lacks model.merges"),
    "bytes without fallback": (llama, in_file(lambda v: v["model"].pop("byte_fallback")), "byte_fallback"),
    "unknown piece is missing": (unigram, in_file(lambda v: v["model"].update(unk_id=999)), "UnkId"),
    "no unknown piece": (unigram, in_file(lambda v: v["model"].update(unk_id=None)), "unk_id"),
    "score is missing": (unigram, in_file(lambda v: v["model"]["vocab"].append(["x"])), "a piece and its score"),
    "added token without id": (words, in_file(lambda v: v["added_tokens"].append(TOKEN)), "with id and content"),
    "added token of a taken id": (
        words,
        in_file(lambda v: v["added_tokens"].append(TOKEN | {"id": 0, "special": True})),
        "the same id 0",
    ),
    "added token moved": (words, in_file(lambda v: v["added_tokens"][0].update(id=3)), "id 0 already"),
    "added token beyond a gap": (
        words,
        in_file(lambda v: v["added_tokens"].append(TOKEN | {"id": 99, "special": True})),
        "reads it as 5",
    ),
    "template of a missing token": (
        lambda folder: byte_level(folder, "<s> $A"),
        in_file(lambda v: v["post_processor"].update(special_tokens={})),
        "special_tokens lack",
    ),
    "template of another id": (
        lambda folder: byte_level(folder, "<s> $A"),
        in_file(lambda v: v["post_processor"]["special_tokens"]["<s>"].update(ids=[7])),
        "unlike the vocabulary",
    ),
    "template without text": (
        lambda folder: byte_level(folder, "<s> $A"),
        in_file(lambda v: v["post_processor"]["single"].pop()),
        "does not hold the text",
    ),
    "config is not JSON": (words, write(CONFIG, "{"), "not JSON"),
    "config is a list": (words, write(CONFIG, "[]"), "not an object"),
    "class is a number": (words, in_config(lambda v: v.update(tokenizer_class=3)), "tokenizer_class is 3"),
    "eos is a number": (words, in_config(lambda v: v.update(eos_token=2)), "eos_token is 2"),
    "eos is empty": (words, in_config(lambda v: v.update(eos_token="")), 'eos_token is ""'),
    "prefix is a number": (words, in_file(lambda v: v["model"].update(continuing_subword_prefix=2)), "prefix is 2"),
    "eos is unknown": (words, in_config(lambda v: v.update(eos_token="<|end|>")), "eos_token '<|end|>'"),
    "added_tokens_decoder is a list": (words, in_config(lambda v: v.update(added_tokens_decoder=[])), "decoder is"),
    "added_tokens_decoder moves": (
        words,
        in_config(lambda v: v.update(added_tokens_decoder={"3": TOKEN | {"special": False}})),
        "adds token '<new>'",
    ),
    "template is no Jinja": (words, in_config(lambda v: v.update(chat_template="{% if %}")), "not Jinja"),
    "template is a number": (words, in_config(lambda v: v.update(chat_template=5)), "chat_template is 5"),
    "template file is no Jinja": (words, write("chat_template.jinja", "{{ messages"), "not Jinja"),
    "needs code": (
        words,
        in_config(lambda v: v.update(tokenizer_class="My", auto_map={"AutoTokenizer": ["my.My", None]})),
        "code of its own",
    ),
    "special_tokens_map is not JSON": (words, write("special_tokens_map.json", "nope"), "not JSON"),
    "added_tokens is no map": (words, write("added_tokens.json", "[1]"), "not an object"),
    "a name twice": (words, write("added_tokens.json", '{"a": 5, "a": 6}'), "'a' twice"),
    "the model's config is not JSON": (words, write("config.json", "{"), "not JSON"),
    "tokenizer.model is cut short": (sentence_piece, cut("tokenizer.model", 700), "cannot be read as a tokenizer"),
    "tokenizer.model is text": (sentence_piece, write("tokenizer.model", "hello\n"), "cannot be read as a tokenizer"),
    "class is unknown": (sentence_piece, in_config(lambda v: v.update(tokenizer_class="Nope")), "tokenizer_class Nope"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_one_line_that_names_the_file(name, tmp_path):
    kind, (file, damage), message = DAMAGE[name]
    folder = kind(tmp_path / "base")
    damage(folder)
    with pytest.raises(TokenizerError) as caught:
        open_tokenizer(folder)
    text = str(caught.value)
    assert str(folder / file) in text and message in text and "\n" not in text
    with pytest.raises(EclectusError, match=file):
        load_tokenizer(folder)
    if name == "needs code":
        # A model may be converted whatever its tokenizer needs.
        check_tokenizer(folder, 100)
    else:
        with pytest.raises(TokenizerError, match=file):
            check_tokenizer(folder, 100_000)


def test_no_tokenizer_and_no_end_of_document_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(TokenizerError, match=str(folder)):
            open_tokenizer(folder)
    check_tokenizer(tmp_path / "empty", 10)
    change(words(tmp_path / "endless") / CONFIG, lambda v: v.pop("eos_token"))
    assert open_tokenizer(tmp_path / "endless").eos_token_id is None
    with pytest.raises(EclectusError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path / "endless")


def test_a_vocabulary_that_nothing_says_how_to_use_is_refused(tmp_path):
    byte_level(tmp_path)
    model = json.loads((tmp_path / FILE).read_text())["model"]
    (tmp_path / FILE).unlink()
    (tmp_path / CONFIG).unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
    with pytest.raises(TokenizerError, match="nothing says how text is cut"):
        open_tokenizer(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "!"}))
    assert open_tokenizer(tmp_path)("an html", add_special_tokens=False)["input_ids"]


def test_without_sentencepiece_the_message_names_the_extra(tmp_path, monkeypatch):
    folder = sentence_piece(tmp_path)
    assert text_frame(open_tokenizer(folder)) == ([1], [])
    monkeypatch.setattr(tokenizer_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TokenizerError, match=r"tokenizer.model needs sentencepiece.*eclectus\[sentencepiece\]"):
        open_tokenizer(folder)


@pytest.mark.parametrize("name", ["BertTokenizer", "LlamaTokenizerFast", "T5Tokenizer", "Nope", "GPT2TokenizerFast"])
@pytest.mark.parametrize("kind", [byte_level, words, unigram])
def test_a_class_that_cuts_text_otherwise_does_not_count_beside_tokenizer_json(kind, name, tmp_path):
    folder = kind(tmp_path)
    expected = ids(open_tokenizer(folder))
    change(folder / CONFIG, lambda v: v.update(tokenizer_class=name))
    assert ids(open_tokenizer(folder)) == expected


def test_truncation_and_padding_of_a_file_do_not_cut_texts_and_are_kept(tmp_path):
    folder = words(tmp_path)
    limits = {
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[UNK]",
        },
    }
    change(folder / FILE, lambda v: v.update(limits))
    tokenizer = open_tokenizer(folder)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2 and tokenizer.backend_tokenizer.padding
    assert text_frame(tokenizer) == ([], [])


def test_tokens_beyond_the_embeddings_are_accepted_only_if_no_text_yields_them(tmp_path, caplog):
    folder = words(tmp_path)
    change(folder / FILE, lambda v: v["added_tokens"].append(PAD))
    change(folder / CONFIG, lambda v: v.update(pad_token="[PAD]"))
    with caplog.at_level(logging.WARNING, logger="eclectus"):
        check_tokenizer(folder, 5)
    assert "[PAD]" in caplog.text
    tokenizer = open_tokenizer(folder)
    assert (vocabulary_size(tokenizer), usable_size(tokenizer)) == (6, 5)
    with pytest.raises(TokenizerError, match=r"token id 4 \('page'\).*vocabulary has 4.*not the model's"):
        check_tokenizer(folder, 4)
    change(folder / CONFIG, lambda v: v.update(eos_token="[PAD]"))
    with pytest.raises(TokenizerError, match=r"token id 5 \('\[PAD\]'\)"):
        check_tokenizer(folder, 5)


def test_ids_with_gaps_count_up_to_the_largest(tmp_path):
    folder = words(tmp_path, {"[UNK]": 0, "</s>": 1, "an": 2, "html": 70_000})
    tokenizer = open_tokenizer(folder)
    assert len(tokenizer) == 4 and vocabulary_size(tokenizer) == usable_size(tokenizer) == 70_001
    with pytest.raises(TokenizerError, match="token id 70000"):
        check_tokenizer(folder, 70_000)


FRAMES = {
    "nothing": (byte_level, [], []),
    "template": (lambda folder: byte_level(folder, "<s> $A"), [300], []),
    "both sides": (lambda folder: byte_level(folder, "<s> $A </s>"), [300], [301]),
    "twice": (lambda folder: byte_level(folder, "<s> <s> $A"), [300, 300], []),
    "end alone": (lambda folder: byte_level(folder, "$A </s>"), [], [301]),
    "llama": (llama, [1], []),
    "bert": (word_piece, [2], [1]),
    "unigram": (unigram, [], []),
}


@pytest.mark.parametrize("name", FRAMES)
def test_what_stands_around_a_text_is_what_the_tokenizer_puts_there(name, tmp_path):
    kind, before, after = FRAMES[name]
    folder = kind(tmp_path)
    assert text_frame(open_tokenizer(folder)) == (before, after)
    plain = AutoTokenizer.from_pretrained(folder)
    for text in ("an html page", "the river"):
        assert plain(text)["input_ids"] == [*before, *plain(text, add_special_tokens=False)["input_ids"], *after]


def test_add_bos_token_in_the_config_counts_where_the_file_has_no_template(tmp_path):
    folder = byte_level(tmp_path)
    change(folder / CONFIG, lambda v: v.update(add_bos_token=True))
    tokenizer = open_tokenizer(folder)
    assert text_frame(tokenizer) == ([300], [])
    tokenizer.save_pretrained(tmp_path / "again")
    assert text_frame(open_tokenizer(tmp_path / "again")) == ([300], [])


class Slow(PreTrainedTokenizer):
    """Letters, without a Rust back-end; <s> before every text."""

    letters = ("</s>", "<s>", "<unk>", *"abcdefgh ijklmn", "§")
    vocab_size = property(lambda self: 40)

    def get_vocab(self):
        return {letter: 2 * number for number, letter in enumerate(self.letters)}

    def _tokenize(self, text, **_):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 4)

    def _convert_id_to_token(self, number):
        return self.letters[number // 2]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [2, *token_ids_0]


def test_a_tokenizer_without_rust_has_a_frame_and_a_largest_id():
    tokenizer = Slow(eos_token="</s>", bos_token="<s>", unk_token="<unk>", special_tokens_pattern="none")
    assert text_frame(tokenizer) == ([2], [])
    assert vocabulary_size(tokenizer) == 2 * (len(Slow.letters) - 1) + 1


def ids(tokenizer):
    texts = [*PROBES, "an html page <s> the", "ποτάμι </s> 12"]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def places(value, at=()):
    """Every place in a JSON value but the entries of vocabularies and merges, which are content, not form."""
    yield at
    if at[-1:] in (("vocab",), ("merges",)):
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from places(each, (*at, key))


def damaged(text, generator):
    """The text with one cut, one field less, or one field of another type."""
    if generator.random() < 0.1:
        return text[: generator.randrange(len(text))]
    value = json.loads(text)
    *path, last = generator.choice([at for at in places(value) if at])
    inner = value
    for key in path:
        inner = inner[key]
    if generator.random() < 0.4:
        del inner[last]
    else:
        others = [None, 7, -1, 1.5, "x", "", [], {}, [1], {"a": 1}, ["a", "b"], {"type": "x"}, 2**40]
        inner[last] = generator.choice([each for each in others if type(each) is not type(inner[last])])
    return json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize("kind", [byte_level, llama, unigram, words, word_piece])
def test_any_damage_is_a_line_that_names_a_file_or_changes_no_id(kind, tmp_path):
    folder, generator = kind(tmp_path / "base"), random.Random(kind.__name__)
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    tokenizer = load_tokenizer(folder)
    expected = ids(tokenizer), text_frame(tokenizer), tokenizer.eos_token_id
    refused = 0
    for name in [FILE] * 40 + [CONFIG] * 15:
        (folder / name).write_text(damaged((whole / name).read_text(), generator))
        try:
            tokenizer = load_tokenizer(folder)
            assert (ids(tokenizer), text_frame(tokenizer), tokenizer.eos_token_id) == expected
        except EclectusError as error:
            refused += 1
            assert str(folder) in str(error) and "\n" not in str(error)
        shutil.copy(whole / name, folder / name)
    assert refused > 15

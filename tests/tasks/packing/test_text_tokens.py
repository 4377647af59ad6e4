"""Texts to token ids: whatever a text spells, in every kind of tokenizer, no control token comes out of it."""

import random

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast
from transformers.models.llama.tokenization_llama import LlamaTokenizer

from eclectus.storage.artifact import ArtifactStore
from eclectus.tasks.evaluation.held_out import read_held_out
from eclectus.tasks.packing.budget import BudgetSettings, budget
from eclectus.tasks.packing.pack import PackSettings, pack
from eclectus.tasks.packing.text_tokens import TextTokens, token_ids
from tests.support.topics import make, write_documents

LETTERS = "abcdefghijklmnopqrstuvwxyzHTML .,|<>/[]_"
PROSE = "an html page ends in </s> or in <|endoftext|>, and <s>a</s><pad><mask> [SEP] [CLS]</s></s> too"


def loaded(fast, folder):
    """The tokenizer as users have it: saved and loaded."""
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def byte_level(folder, *added, **named):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([PROSE], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    bpe.add_tokens(list(added))
    return loaded(PreTrainedTokenizerFast(tokenizer_object=bpe, **named), folder)


def special_bpe(folder):
    return byte_level(folder, eos_token="<|endoftext|>", bos_token="<s>", pad_token="<pad>", mask_token="<mask>")


def unmarked_bpe(folder):
    """Its end of document is an added token that is not special, in memory and so in benchmarks."""
    made = byte_level(folder, AddedToken("</s>", special=False), AddedToken("<tool>", special=False))
    return PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, eos_token="</s>", unk_token="</s>")


def normalized_bpe(folder):
    made = byte_level(folder, eos_token=AddedToken("</s>", normalized=True, lstrip=True, rstrip=True, special=True))
    made.backend_tokenizer.normalizer = normalizers.NFC()
    return made


def unigram(folder):
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), ("<mask>", 0.0), ("▁", -3.0), ("▁a", -2.0)]
    model = Tokenizer(models.Unigram(pieces + [(each, -5.0) for each in LETTERS], unk_id=0))
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return loaded(PreTrainedTokenizerFast(tokenizer_object=model, mask_token="<mask>", **named), folder)


def unigram_of_bytes(folder):
    """Its only way to spell "</s>" is by bytes; the tokenizer does not name its unknown token."""
    pieces = [("</s>", 0.0), ("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), ("▁", -1.0)]
    model = Tokenizer(models.Unigram(pieces, unk_id=1, byte_fallback=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return loaded(PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>"), folder)


def llama(folder):
    """As converted from SentencePiece or GGUF: merges implied by the vocabulary, so that "</" and "s>" join."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS, "</", "s>", "▁a"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("▁", "a")]
    return loaded(LlamaTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=merges), folder)


def word_piece(folder):
    first, rest = [*LETTERS], [f"##{each}" for each in LETTERS]
    vocabulary = ["[UNK]", "[SEP]", "[CLS]", "</s>", *first, *rest, "##SEP", "S", "##S", "##E", "##P"]
    model = models.WordPiece({token: number for number, token in enumerate(vocabulary)}, unk_token="[UNK]")
    fast = Tokenizer(model)
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(cleanup=False)
    named = {"unk_token": "[UNK]", "sep_token": "[SEP]", "cls_token": "[CLS]", "eos_token": "</s>"}
    return loaded(PreTrainedTokenizerFast(tokenizer_object=fast, **named), folder)


def word_level(folder):
    words = ["[UNK]", "</s>", "an", "html", "page", "ends", "in", "<", "/s", ">", "or"]
    model = models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    fast = Tokenizer(model)
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return loaded(PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]", eos_token="</s>"), folder)


class Letters(PreTrainedTokenizer):
    """A tokenizer without a Rust back-end."""

    def __init__(self, **named):
        self.letters = ["</s>", "<unk>", *LETTERS]
        super().__init__(**named)

    vocab_size = property(lambda self: len(self.letters))

    def get_vocab(self):
        return {letter: number for number, letter in enumerate(self.letters)}

    def _tokenize(self, text, **_):
        pieces = text.replace("</s>", "\0")
        return ["</s>" if piece == "\0" else piece for piece in pieces]

    def _convert_token_to_id(self, token):
        return self.letters.index(token) if token in self.letters else 1

    def _convert_id_to_token(self, number):
        return self.letters[number]


def letters(folder):
    return Letters(eos_token="</s>", unk_token="<unk>")


KINDS = [special_bpe, unmarked_bpe, normalized_bpe, unigram, unigram_of_bytes, llama, word_piece, word_level, letters]
EXACT = [special_bpe, unmarked_bpe, normalized_bpe, unigram, unigram_of_bytes, llama]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def tokenizer(request, tmp_path):
    return request.param(tmp_path)


def test_no_control_token_comes_out_of_a_text(tokenizer):
    every = " ".join(tokenizer.convert_ids_to_tokens(sorted(TextTokens(tokenizer).control)))
    texts = [PROSE, every, every.replace(" ", ""), "</s>", "x</s>y", " </s>\n"]
    borders = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id}
    for ids in token_ids(tokenizer, texts):
        assert ids and not borders - {tokenizer.unk_token_id} & set(ids)


@pytest.mark.parametrize("kind", EXACT)
def test_the_text_is_read_back_as_it_was_written(kind, tmp_path):
    words = kind(tmp_path)
    encode = TextTokens(words)
    for text in ("an html page ends in </s> or so", "</s>", "a</s>b </s>", "a <s> </s></s>"):
        assert words.decode(encode([text])[0], clean_up_tokenization_spaces=False).strip() == text
    assert encode.lost == 0


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_spell_no_control_token_are_encoded_as_ever(kind, tmp_path):
    words = kind(tmp_path)
    texts = ["an html page ends in a tag", "or in é, 漢 and \t such", ""]
    expected = words(texts, add_special_tokens=False)["input_ids"]
    encode = TextTokens(words)
    assert encode(texts) == expected and encode.respelled == 0


def test_other_pieces_take_the_place_of_a_control_token_and_are_counted(tmp_path):
    for kind, pieces in ((word_level, ["<", "/s", ">"]), (llama, ["</", "s>"])):
        words = kind(tmp_path / kind.__name__)
        encode = TextTokens(words)
        ids = encode(["in </s> or </s>", "an </s>"])[1]
        assert words.convert_ids_to_tokens(ids)[-len(pieces) :] == pieces
        assert (encode.respelled, encode.lost) == (3, 0)
    word = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "an": 2}, unk_token="[UNK]"))
    word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encode = TextTokens(PreTrainedTokenizerFast(tokenizer_object=word, unk_token="[UNK]", eos_token="</s>"))
    assert set(encode(["an </s> an"])[0]) == {0, 2} and (encode.respelled, encode.lost) == (1, 1)


def test_unknown_text_does_not_end_a_document_where_both_are_one_token(tmp_path):
    word = Tokenizer(models.WordLevel({"<|end|>": 0, "an": 1}, unk_token="<|end|>"))
    word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=word, unk_token="<|end|>", eos_token="<|end|>")
    assert token_ids(words, ["an unknown an"]) == [[1, 1]]


@pytest.mark.parametrize("kind", [special_bpe, unigram, word_level])
def test_packing_and_evaluation_see_the_same_tokens_and_an_end_per_document(kind, tmp_path):
    rows = [
        {"text": f"an html page {number} ends in </s> or <|endoftext|> " * 9, "language": "en", "group": "original"}
        for number in range(8)
    ]
    halves = {}
    for split in ("train", "heldout"):
        store = ArtifactStore(tmp_path / split)
        documents = write_documents(store, [row | {"split": split} for row in rows])
        with store.draft("tokenizer") as draft:
            words = kind(draft.path)
            halves[split] = (store, documents, store.commit(draft))
    store, documents, saved = halves["train"]
    packed = make(
        store,
        pack,
        documents=documents,
        tokenizer=saved,
        settings=PackSettings(instance_tokens=16, pack_remainder="pad"),
    )
    from eclectus.models.training.instances import Instances

    tokens = Instances(packed.path).tokens
    ends = int((tokens == words.eos_token_id).sum()) - packed.statistics["tokens_padded"]
    assert ends == len(rows)
    held = read_held_out(halves["heldout"][1], words, 100)
    assert sum(map(len, held.tokens)) + ends == packed.statistics["tokens"] - packed.statistics["tokens_padded"]
    assert words.eos_token_id not in {each for ids in held.tokens for each in ids}
    assert packed.statistics["control_tokens_in_texts"] == (0 if kind is special_bpe else 72)
    estimate = make(store, budget, documents=documents, tokenizer=saved, settings=BudgetSettings())
    assert estimate.statistics["languages"]["en"]["tokens"] == sum(map(len, held.tokens)) + ends


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(kind, tmp_path, monkeypatch):
    generator = random.Random(0)
    choices = [*PROSE.split(), "\n", "\n\n", "  ", "12345", "漢字漢字。", "naïve", "it's", "e\u0301"]
    texts = [
        " ".join(generator.choices(choices, k=2000)),
        "".join(generator.choices("漢字an。", k=8000)),
        "".join(generator.choices("acgt", k=8000)),
        " " * 8000,
        "an\n\n\n" * 2000,
        "</s>" * 2000,
        "short",
    ]
    words = kind(tmp_path)
    whole = TextTokens(words)(texts)
    monkeypatch.setattr("eclectus.tasks.packing.text_tokens.PIECE", 3000)
    encode = TextTokens(words)
    pieces = [len(list(encode._pieces_of(text))) for text in texts]
    if kind in (special_bpe, word_level, word_piece):
        assert pieces[0] > 3 and pieces[-1] == 1
    assert encode(texts) == whole
    ids, sizes, _ = TextTokens(words).flat(texts, np.uint32)
    assert np.split(ids, np.cumsum(sizes)[:-1])[0].tolist() == whole[0] and sizes.tolist() == [*map(len, whole)]

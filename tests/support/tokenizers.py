"""Small tokenizers of every kind, as users have them on disk."""

import json
import random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.tokenization_llama import LlamaTokenizer

PROSE = "an html page, the river town and 3.14159 o'clock; ποτάμι πόλη, 中文 and naïve café"
LETTERS = "abcdefghijklmnopqrstuvwxyzHTML .,|<>/[]_"


def byte_level(folder, template=None, **named):
    """A byte-level BPE like Llama 3's. template: what stands around a text, as "<s> $A"."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    bpe.train_from_iterator([PROSE] * 3, trainer)
    bpe.add_special_tokens(["<s>", "</s>"])
    if template:
        special = [(token, bpe.token_to_id(token)) for token in ("<s>", "</s>")]
        bpe.post_processor = processors.TemplateProcessing(template, None, special)
    named = {"bos_token": "<s>", "eos_token": "</s>"} | named
    PreTrainedTokenizerFast(tokenizer_object=bpe, **named).save_pretrained(folder)
    return folder


def llama(folder, **named):
    """As converted from SentencePiece: pieces for bytes, and <s> before every text."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS, "▁a", "▁t", "▁th"]
    merges = [("▁", "a"), ("▁", "t"), ("▁t", "h")]
    vocab = {token: number for number, token in enumerate(tokens)}
    LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, **named).save_pretrained(folder)
    return folder


def unigram(folder):
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -3.0), ("▁a", -2.0), *((each, -5.0) for each in LETTERS)]
    model = Tokenizer(models.Unigram(pieces, unk_id=0))
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def words(folder, ids=None, **named):
    """A word-level one. ids: of its tokens, which may have gaps."""
    ids = ids or {"[UNK]": 0, "</s>": 1, "an": 2, "html": 3, "page": 4}
    model = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"unk_token": "[UNK]", "eos_token": "</s>"} | named
    PreTrainedTokenizerFast(tokenizer_object=model, **named).save_pretrained(folder)
    return folder


def word_piece(folder):
    """Like BERT's: [CLS] before and [SEP] after every text."""
    vocabulary = ["[UNK]", "[SEP]", "[CLS]", "</s>", *LETTERS, *(f"##{each}" for each in LETTERS)]
    model = Tokenizer(models.WordPiece({token: n for n, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    model.pre_tokenizer, model.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    model.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 2))
    named = {"unk_token": "[UNK]", "sep_token": "[SEP]", "cls_token": "[CLS]", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=model, **named).save_pretrained(folder)
    return folder


def sentence_piece(folder, kind="bpe"):
    """Only tokenizer.model, as older checkpoints have it."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    lines = (" ".join(generator.sample(PROSE.split(), 6)) for _ in range(200))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type=kind,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    return folder


def change(path, edit):
    """Rewrites a JSON file; edit changes the value in place."""
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value, ensure_ascii=False))

"""Training a tokenizer: as ever on ordinary text, in linear time on text without breaks, on a bounded sample."""

import random
from collections import Counter

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from eclectus.storage.artifact import ArtifactStore
from eclectus.tasks.documents import table
from eclectus.tasks.packing.tokenizer import END_OF_DOCUMENT, TokenizerSettings, tokenizer
from eclectus.tasks.packing.tokenizer_training import OVER_BYTES, WORD_BYTES, sample, train_bpe
from tests.support.topics import TOPICS, make, topical, write_documents

MEGABYTE = 1_000_000


def trained_whole(texts, vocabulary):
    """Without cutting words, as `tokenizers` documents it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def without_breaks(kind, length):
    generator = random.Random(0)
    return {
        "acgt": lambda: "".join(generator.choices("ACGT", k=length)),
        "chinese": lambda: "".join(generator.choices([chr(0x4E00 + i) for i in range(2000)], k=length // 3)),
        "spaces": lambda: " " * length,
        "one letter": lambda: "a" * length,
        "signs": lambda: "".join(generator.choices("-=+*", k=length)),
    }[kind]()


def test_ordinary_text_gives_the_tokenizer_that_training_on_whole_words_gives():
    texts = [row["text"] for row in topical(dict.fromkeys(TOPICS, 20))] + ["-" * WORD_BYTES, "x" * WORD_BYTES]
    assert train_bpe(iter(texts), 900, END_OF_DOCUMENT).to_str() == trained_whole(texts, 900).to_str()


@pytest.mark.parametrize("kind", ["acgt", "chinese", "spaces", "one letter", "signs"])
def test_a_run_without_breaks_is_trained_on_in_pieces_and_read_back_whole(kind):
    run = without_breaks(kind, MEGABYTE // 2)
    bpe = train_bpe(iter([run]), 600, END_OF_DOCUMENT)
    assert bpe.decode(bpe.encode(run).ids, skip_special_tokens=False) == run
    if kind != "chinese":
        pieces = [run[begin : begin + WORD_BYTES] for begin in range(0, len(run), WORD_BYTES)]
        assert bpe.to_str() == trained_whole(pieces, 600).to_str()


def sampled_by_reading_everything(rows, budget):
    """The first texts of every language until its share is used."""
    languages = {row["language"] for row in rows}
    left = dict.fromkeys(languages, budget // len(languages))
    for row in rows:
        if left[row["language"]] > 0:
            left[row["language"]] -= len(row["text"].encode())
            yield row["text"]


@pytest.mark.parametrize("budget", [0, 1, 3_000, 20_000, MEGABYTE])
def test_the_sample_of_one_part_is_the_first_documents_of_every_language(tmp_path, budget):
    rows = topical(dict.fromkeys(TOPICS, 30)) + [
        {"text": f"nobody knows {number}", "language": None} for number in "ab"
    ]
    others = [{"text": f"held out {number}", "language": "en", "split": "heldout"} for number in range(9)]
    left_out = [{"text": f"other {number}", "language": "xx", "group": "other"} for number in range(9)]
    rows = [{"group": "original"} | row for row in rows]
    documents = write_documents(ArtifactStore(tmp_path), [*others, *rows[:70], *left_out, *rows[70:]])
    assert list(sample(documents, budget)) == list(sampled_by_reading_everything(rows, budget))


def test_the_sample_of_several_parts_is_spread_over_them_and_its_size_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROWS_PER_PART", 64)
    rows = topical(dict.fromkeys(TOPICS, 80))
    rows = sorted(rows, key=lambda row: row["domain"])
    documents = write_documents(ArtifactStore(tmp_path), [{"group": "original"} | row for row in rows])
    count = len(table.parts(documents))
    assert count > 4
    texts = list(sample(documents, 20_000))
    where = {row["text"]: number // 64 for number, row in enumerate(rows)}
    assert set(map(where.get, texts)) == set(range(count))
    language = {row["text"]: row["language"] for row in rows}
    sizes = Counter()
    for text in texts:
        sizes[language[text]] += len(text.encode())
    longest = max(len(text.encode()) for text in texts)
    assert all(20_000 // 3 <= size < 20_000 // 3 + longest * count for size in sizes.values())
    assert sorted(sample(documents, 10**9)) == sorted(language)


def test_one_document_of_megabytes_is_cut_where_the_budget_ends(tmp_path):
    rows = [{"text": f"short {number}", "language": "en"} for number in range(5)]
    rows += [{"text": "中文" * MEGABYTE, "language": "zh"}, {"text": "a b " * MEGABYTE, "language": "en"}]
    documents = write_documents(ArtifactStore(tmp_path), [{"group": "original"} | row for row in rows])
    texts = list(sample(documents, MEGABYTE))
    sizes = [len(text.encode()) for text in texts]
    assert len(texts) == 7 and sizes[5] == MEGABYTE // 2 - MEGABYTE // 2 % 3 and sizes[6] <= MEGABYTE // 2
    assert sum(len(text.encode()) for text in sample(documents, 100)) <= 2 * OVER_BYTES + 50
    made = make(
        ArtifactStore(tmp_path / "other"),
        tokenizer,
        documents=documents,
        settings=TokenizerSettings(tokenizer_vocabulary=400, tokenizer_sample_megabytes=0.5),
    )
    assert 256 < made.statistics["vocabulary"] <= 400

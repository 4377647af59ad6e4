import unicodedata
from itertools import combinations

import numpy as np
import pytest

from eclectus.storage.artifact import ArtifactStore
from eclectus.tasks.documents.near_duplicates import band_width, near_duplicate_pairs
from eclectus.tasks.documents.normalise import normalised
from eclectus.tasks.documents.shingles import BINS, overlap, shingles, sketch
from eclectus.tasks.documents.split import SplitSettings, split
from eclectus.tasks.documents.table import read_table
from eclectus.tasks.grouping.encoder import EmbedSettings, Encoder
from tests.support.topics import make, write_documents

# Passages of a few letters each, with accents that NFD takes apart: words are made of them.
ALPHABETS = {
    "tr": "abcçdegğhıijkloöprsştuüvyz",
    "el": "αάβγδεέηήιίκλμνοόπρστυύφχωώ",
    "hu": "aábcdeéghiíklmnoóöőprstuúüű",
    "vi": "aăâbcdđeêghiklmnoôơpqrstuưvxyấềộữ",
    "ko": "가나다라마바사아자차카타파하각낙닥락",
}


def words_of(random, alphabet, count=4000):
    return np.array(["".join(random.choice(list(alphabet), random.integers(2, 9))) for _ in range(count)], object)


def varied(random, vocabulary, count):
    """Texts with copies of which some words, none to half, are others."""
    texts = []
    for _ in range(count):
        words = vocabulary[random.integers(0, len(vocabulary), random.integers(15, 120))]
        texts.append(" ".join(words))
        for _ in range(random.integers(0, 3)):
            changed = words.copy()
            here = random.random(len(words)) < random.choice([0.02, 0.05, 0.1, 0.3])
            changed[here] = vocabulary[random.integers(0, len(vocabulary), int(here.sum()))]
            texts.append(" ".join(changed))
    return list(dict.fromkeys(texts))


@pytest.mark.parametrize(("seed", "threshold"), [(0, 0.7), (1, 0.7), (2, 0.5), (3, 0.9)])
def test_nearly_all_pairs_of_a_brute_force_search_are_found_and_none_that_it_does_not_find(tmp_path, seed, threshold):
    random = np.random.default_rng(seed)
    texts = varied(random, words_of(random, ALPHABETS["hu"], 1500), 80)
    documents = write_documents(ArtifactStore(tmp_path), [{"text": text} for text in texts])
    found, overlaps = near_duplicate_pairs(documents, random.permutation(len(texts)), threshold)
    sets = [{text[i : i + 5] for i in range(len(text) - 4)} for text in map(normalised, texts)]
    exact = {(a, b): len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in combinations(range(len(texts)), 2)}
    expected = {pair for pair, value in exact.items() if value >= threshold}
    got = {tuple(pair): value for pair, value in zip(found.tolist(), overlaps.tolist(), strict=True)}
    assert set(got) <= expected and len(expected) > 10
    assert len(got) >= len(expected) - 1 - 0.02 * len(expected)
    assert [exact[pair] for pair in got] == pytest.approx(list(got.values()), abs=1e-3)


def test_two_sketches_agree_as_often_as_their_texts_overlap():
    random = np.random.default_rng(0)
    texts = varied(random, words_of(random, ALPHABETS["el"]), 120)
    sketches = np.zeros((len(texts), BINS), np.uint8)
    for text, out in zip(texts, sketches, strict=True):
        sketch(text, out)
    pairs = [(a, a + 1) for a in range(len(texts) - 1)]
    errors = [(sketches[a] == sketches[b]).mean() - overlap(shingles(texts[a]), shingles(texts[b])) for a, b in pairs]
    assert abs(np.mean(errors)) < 0.01 and np.std(errors) < 0.05
    assert 1 - (1 - 0.7 ** band_width(0.7)) ** (BINS // band_width(0.7)) > 0.995


@pytest.mark.parametrize("language", ALPHABETS)
def test_a_twin_in_another_unicode_form_with_a_few_other_words_does_not_cross_the_held_out_border(tmp_path, language):
    random = np.random.default_rng(len(language))
    vocabulary = words_of(random, ALPHABETS[language])
    rows = []
    for number in range(60):
        words = vocabulary[random.integers(0, len(vocabulary), 80)]
        twin = unicodedata.normalize("NFD", " ".join([*words[:40], f"{number}", *words[40:]]))
        rows += [{"text": text, "language": language, "domain": "a"} for text in (" ".join(words), twin)]
    documents = make(
        ArtifactStore(tmp_path),
        split,
        documents=write_documents(ArtifactStore(tmp_path), rows),
        settings=SplitSettings(heldout_fraction=0.3),
    )
    split_of = read_table(documents, ["split"])["split"].to_pylist()
    assert documents.statistics["pages"] == 60
    for one, other in zip(split_of[::2], split_of[1::2], strict=True):
        assert {one, other} in ({"train"}, {"heldout", "apart"})


def test_twins_in_other_unicode_forms_get_the_same_vector(tmp_path):
    class Lengths:
        def __call__(self, texts):
            return np.array([[len(text), sum(map(ord, text)), 1.0] for text in texts])

    encoder = Encoder.__new__(Encoder)
    encoder.settings, encoder._encode = EmbedSettings(embedding_maximum_characters=50), Lengths()
    text = "Árvíztűrő tükörfúrógép " * 4
    one, other = encoder.encode([text, unicodedata.normalize("NFD", text)])
    assert np.array_equal(one, other)

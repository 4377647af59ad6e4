import unicodedata
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from eclectus.storage.artifact import ArtifactStore
from eclectus.tasks.documents import near_duplicates as module
from eclectus.tasks.documents.near_duplicates import candidates, overlaps, read_pairs, sketches, write_near_duplicates
from eclectus.tasks.documents.near_duplicates.candidates import band_width, bands_of
from eclectus.tasks.documents.normalise import normalised
from eclectus.tasks.documents.shingles import BINS, overlap, shingles
from eclectus.tasks.documents.shingles import sketches as sketches_of
from eclectus.tasks.documents.split import SplitSettings, split
from eclectus.tasks.documents.table import read_table
from eclectus.tasks.grouping.encoder import EmbedSettings, Encoder
from tests.support.topics import in_parts, make, write_documents

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


def pairs_of(documents, rank, threshold, workers=1):
    """(lower row, higher row) -> overlap."""
    path = Path(documents.path).parent / f"pairs-{threshold}.parquet"
    write_near_duplicates(documents, rank, threshold, path, workers)
    return {pair[:2]: pair[2] for block in read_pairs(path) for pair in zip(*(c.tolist() for c in block), strict=True)}


def texts_in_parts(store, texts, *ends):
    """Documents of these texts, in parts that end at these rows."""
    return in_parts(store, write_documents(store, [{"text": text} for text in texts]), *ends)


def corpus(kind, random):
    """Texts of one kind, all different."""
    vocabulary = words_of(random, ALPHABETS["hu"], 1500)
    page = vocabulary[random.integers(0, len(vocabulary), 60)]
    pages = [" ".join(vocabulary[random.integers(0, len(vocabulary), 40)]) for _ in range(100)]
    texts = {
        "copies": lambda: varied(random, vocabulary, 150),
        "templates": lambda: [
            " ".join(np.where(random.random(60) < 0.1, vocabulary[random.integers(0, len(vocabulary), 60)], page))
            for _ in range(250)
        ],
        "counters": lambda: [f"{' '.join(page)} page {i} of 400" for i in range(250)],
        "reordered": lambda: [" ".join(random.permutation(page)) for _ in range(250)],
        "cluster": lambda: [*pages, *(f"{pages[7]} copy {i}" for i in range(400))],
        "short": lambda: [f"{vocabulary[i]}"[: random.integers(1, 9)] + chr(0x4E00 + i) for i in range(250)],
        "one long": lambda: [" ".join(vocabulary[random.integers(0, len(vocabulary), 300_000)]), *pages],
    }[kind]()
    return list(dict.fromkeys(texts))


def reference(texts, rank, threshold):
    """Candidates as the module describes them, from dictionaries."""
    sketch, found, width = sketches_of(texts).astype(np.int64), set(), band_width(threshold)

    def alike(a, b):
        return (sketch[a] == sketch[b]).mean()

    for begin in bands_of(threshold):
        groups = defaultdict(list)
        for row in np.flatnonzero(rank >= 0).tolist():
            groups[tuple(sketch[row, begin : begin + width])].append(row)
        for group in groups.values():
            first = max(group, key=lambda row: rank[row])
            after = [(begin + width + i) % BINS for i in reversed(range(8))]
            group.sort(key=lambda row: (tuple(sketch[row, after]), row))
            found |= {(first, row) for row in group if row != first and alike(first, row) >= threshold - 0.12}
            sure = {row for row in group if len(group) > 4 and alike(first, row) >= threshold + 0.12}
            for step in (1, 2, 3):
                for pair in zip(group, group[step:], strict=False):
                    if not sure.issuperset(pair) and alike(*pair) >= threshold - 0.12:
                        found.add(pair)
    sets = {row: shingles(texts[row]) for row in {row for pair in found for row in pair}}
    measured = {tuple(sorted(pair)): overlap(sets[pair[0]], sets[pair[1]]) for pair in found}
    return {pair: value for pair, value in measured.items() if value >= threshold}


KINDS = ["copies", "templates", "counters", "reordered", "cluster", "short", "one long"]


@pytest.mark.parametrize(("kind", "threshold"), [*((kind, 0.7) for kind in KINDS), ("copies", 0.9), ("counters", 0.9)])
def test_parts_bands_and_ranges_give_the_pairs_of_the_plain_description(tmp_path, kind, threshold, monkeypatch):
    random = np.random.default_rng(len(kind))
    texts = corpus(kind, random)
    rank = random.permutation(len(texts))
    rank[random.random(len(texts)) < 0.05] = -1
    expected = reference(texts, rank, threshold)
    store = ArtifactStore(tmp_path)
    assert pairs_of(write_documents(store, [{"text": text} for text in texts]), rank, threshold) == expected
    monkeypatch.setattr(module, "DOCUMENTS_PER_RANGE", len(texts) // 3)
    monkeypatch.setattr(module, "DOCUMENTS_PER_CALL", 20 * len(texts))
    monkeypatch.setattr(candidates, "COMPARED_AT_A_TIME", 50)
    assert pairs_of(texts_in_parts(store, texts, 50, 50, 77), rank, threshold) == expected
    assert len(expected) > 20 or kind not in ("copies", "counters", "cluster")


CHANGES = [
    "appended",
    "put in front",
    "put in between",
    "taken away",
    "taken away and appended",
    "others excluded",
    "ranked otherwise",
    "reordered",
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("run")
def test_a_corpus_that_changed_reads_and_compares_what_is_new_and_finds_what_a_fresh_one_does(
    home, tmp_path, change, monkeypatch
):
    random = np.random.default_rng(5)
    vocabulary = words_of(random, ALPHABETS["tr"])
    texts = varied(random, vocabulary, 150)
    more = [f"{text} more" for text in texts[40:46]]
    changed, ends = {
        "appended": (texts + more, (100, 200)),
        "put in front": (more + texts, (106, 206)),
        "put in between": (texts[:150] + more + texts[150:], (100, 206)),
        "taken away": (texts[:120] + texts[130:], (100, 190)),
        "taken away and appended": (texts[:120] + texts[130:] + more, (100, 190)),
        "reordered": (texts[::-1], (90, 190)),
    }.get(change, (texts, (100, 200)))
    ranks = dict(zip([*texts, *more], random.permutation(len(texts) + len(more)).tolist(), strict=True))
    then = np.array([ranks[text] for text in texts])
    now = np.array([ranks[text] for text in changed])
    then[20:40] = -1
    if change == "others excluded":
        now[[*range(20, 38), *range(60, 70)]] = -1
    elif change == "ranked otherwise":
        now = random.permutation(len(now))
    first = texts_in_parts(home.store, texts, 100, 200)
    # Bands in two ranges of their bytes, as those of a very large corpus.
    monkeypatch.setattr(module, "DOCUMENTS_PER_RANGE", 1 + len(texts) // 2)
    statistics = write_near_duplicates(first, then, 0.7, tmp_path / "first.parquet", 1)
    with home.store.draft("documents") as out:
        out.file("documents/part-00000.parquet").write_bytes(b"")
        out.statistics = statistics
        home.store.commit(out)
    sketched, shingled, grouped = [], [], []
    for where, name, seen in ((sketches, "sketches", sketched), (overlaps, "shingle_sets", shingled)):
        make_them = getattr(where, name)
        monkeypatch.setattr(where, name, lambda given, seen=seen, make=make_them: (seen.extend(given), make(given))[1])
    form = candidates._groups
    monkeypatch.setattr(candidates, "_groups", lambda rows, *given: (grouped.extend(rows), form(rows, *given))[1])
    grown = texts_in_parts(home.store, changed, *ends)
    got = pairs_of(grown, now, 0.7)
    by_changes, bands = len(grouped), len(bands_of(0.7))
    if change != "reordered":
        assert len(set(sketched)) == (6 if len(changed) > len(texts) or "and appended" in change else 0)
        assert len(set(shingled)) < (120 if change in ("others excluded", "ranked otherwise") else 60)
    grouped.clear()
    fresh = ArtifactStore(tmp_path / "fresh")
    monkeypatch.setattr(module, "earlier_comparison", lambda: None)
    monkeypatch.setattr(module, "RECORDED", "fresh")
    assert got == pairs_of(texts_in_parts(fresh, changed, *ends), now, 0.7)
    assert len(got) > 100
    if change in ("reordered", "ranked otherwise"):
        assert by_changes == len(grouped)
    else:
        assert bands < by_changes < len(grouped) / 3


def test_templates_cost_a_few_pairs_per_document(tmp_path):
    random = np.random.default_rng(0)
    vocabulary = words_of(random, ALPHABETS["hu"], 1500)
    page = " ".join(vocabulary[random.integers(0, len(vocabulary), 60)])
    for size in (500, 4000):
        documents = texts_in_parts(ArtifactStore(tmp_path / str(size)), [f"{page} {i} of {i * 7}" for i in range(size)])
        pairs = pairs_of(documents, random.permutation(size), 0.7)
        assert size - 1 <= len(pairs) < 12 * size


@pytest.mark.parametrize(("seed", "threshold"), [(0, 0.7), (1, 0.7), (2, 0.5), (3, 0.9)])
def test_nearly_all_pairs_of_a_brute_force_search_are_found_and_none_that_it_does_not_find(tmp_path, seed, threshold):
    random = np.random.default_rng(seed)
    texts = varied(random, words_of(random, ALPHABETS["hu"], 1500), 80)
    documents = write_documents(ArtifactStore(tmp_path), [{"text": text} for text in texts])
    got = pairs_of(documents, random.permutation(len(texts)), threshold)
    sets = [{text[i : i + 5] for i in range(len(text) - 4)} for text in map(normalised, texts)]
    exact = {(a, b): len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in combinations(range(len(texts)), 2)}
    expected = {pair for pair, value in exact.items() if value >= threshold}
    assert set(got) <= expected and len(expected) > 10
    assert len(got) >= len(expected) - 1 - 0.02 * len(expected)
    assert [exact[pair] for pair in got] == pytest.approx(list(got.values()), abs=1e-3)


def test_two_sketches_agree_as_often_as_their_texts_overlap():
    random = np.random.default_rng(0)
    texts = varied(random, words_of(random, ALPHABETS["el"]), 120)
    sketches = sketches_of(texts)
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

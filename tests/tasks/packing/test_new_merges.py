"""Learned merges are those of a plain BPE on top of the base's, without what is refused."""

import itertools
import random
from collections import Counter

import pytest

from eclectus.tasks.packing.new_merges import learn_merges
from eclectus.tasks.packing.new_vocabulary import _without
from eclectus.tasks.packing.original_text import IN_TEXT, NO_LETTER, Originals, original_pairs


def slowly(words, encode, count, refused, taken):
    """The same from the definition: all pairs are counted again after every merge."""
    sequences = {word: list(encode(word)) for word in words}
    old = {token for tokens in sequences.values() for token in tokens}
    made, merges = set(taken), []
    while len(merges) < count:
        counts = Counter()
        for word, tokens in sequences.items():
            for pair in itertools.pairwise(tokens):
                counts[pair] += words[word]
        allowed = [
            (-n, *pair)
            for pair, n in counts.items()
            if n > 1 and "".join(pair) not in made and not (set(pair) <= old and refused(*pair))
        ]
        if not allowed:
            return merges
        _, left, right = min(allowed)
        merges.append((left, right))
        made.add(left + right)
        for tokens in sequences.values():
            place = 0
            while place + 1 < len(tokens):
                if (tokens[place], tokens[place + 1]) == (left, right):
                    tokens[place : place + 2] = [left + right]
                place += 1
    return merges


@pytest.mark.parametrize("seed", range(5))
def test_merges_are_those_of_the_definition(seed):
    generator = random.Random(seed)
    words = Counter("".join(generator.choices("abcd", k=generator.randint(1, 9))) for _ in range(120))
    refused = lambda left, right: "no" if (left, right) in (("a", "b"), ("c", "c")) else None  # noqa: E731
    taken = {"ad", "bcd"}
    learned = learn_merges(words, list, 40, refused, taken)
    assert learned.merges == slowly(words, list, 40, refused, taken) and len(learned.merges) > 20
    assert not {("a", "b"), ("c", "c")} & set(learned.merges)
    assert not taken & {left + right for left, right in learned.merges}
    assert learned.left_out["no"] >= 1 and learned.left_out["collides with a token"] >= 1


def test_a_word_with_a_byte_that_has_no_token_is_left_alone():
    assert learn_merges({"axb": 9}, lambda word: ["a", "b"], 5, lambda *_: None, set()).merges == []


def test_what_is_built_on_a_merge_goes_with_it():
    merges = [("a", "b"), ("ab", "c"), ("d", "e"), ("d", "abc"), ("de", "f")]
    assert _without(merges, {0}) == [("d", "e"), ("de", "f")]
    assert _without(merges, {4}) == merges[:4]


def spelled(text):
    from tokenizers.pre_tokenizers import ByteLevel

    return "".join(piece for piece, _ in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text))


@pytest.mark.parametrize(
    "left, right, allowed",
    [
        ("α", "ν", True),  # two letters of a script of their own
        (" ", "α", False),  # a symbol in any text of mathematics
        ("Δ", "x", True),
        ("d", "ğ", True),  # a letter that the originals do not have
        ("ğ", ".", False),
        ("l", "ar", False),  # letters of the originals
        ("é", "t", False),  # names carry the letters of Latin-1
        ("中", "文", True),
        ("1", "2", False),
    ],
)
def test_new_tokens_hold_a_letter_of_their_own(left, right, allowed):
    originals = Originals(letters=Counter("a plain text" * 10_000 + "αλφα"))
    found = originals.refused(spelled(left), spelled(right))
    assert found == (None if allowed else NO_LETTER)
    assert Originals(letters=originals.letters, merges="corpus").refused(spelled(left), spelled(right)) is None
    pair = frozenset({(spelled(left), spelled(right))})
    assert Originals(letters=originals.letters, pairs=pair).refused(spelled(left), spelled(right)) == IN_TEXT


def test_bytes_of_a_foreign_letter_are_joined_and_those_of_a_common_sign_are_not():
    originals = Originals(letters=Counter("a plain text" * 10_000))
    letter, dash, accented = spelled("क"), spelled("—"), spelled("é")
    assert len(letter) == len(dash) == 3 and len(accented) == 2
    assert originals.refused(letter[0], letter[1]) is None and originals.refused(letter[:2], letter[2]) is None
    assert originals.refused(letter[1], letter[2]) is None
    assert originals.refused(dash[0], dash[1]) == NO_LETTER and originals.refused(*accented) == NO_LETTER
    assert originals.refused(dash[:2], dash[2]) == NO_LETTER


def test_pairs_of_a_text_are_those_within_its_documents(tmp_path):
    import numpy as np

    from eclectus.tasks.documents.table import parts
    from tests.support.new_words import make_english

    _store, documents, _, words = make_english(tmp_path, "llama")
    out = tmp_path / "out"
    out.mkdir()
    from eclectus.tasks.documents.table import read_table
    from eclectus.tasks.packing.document_tokens import encoder_of

    about = original_pairs(out, parts(documents)[0], None, words.path)
    texts = read_table(documents, ["text"], (("group", "==", "original"),))["text"].to_pylist()
    expected = set()
    for ids in encoder_of(words.path)(texts):
        expected.update(left << 32 | right for left, right in itertools.pairwise(ids))
    assert set(np.load(out / "pairs.npy").tolist()) == expected and about["documents"] == len(texts)
    points, counts = np.load(out / "letters.npy")
    assert {chr(point): count for point, count in zip(points.tolist(), counts.tolist(), strict=True)} == Counter(
        "".join(texts)
    )

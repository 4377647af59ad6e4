"""Passages: equal to a brute-force search over sets of windows, at every border of blocks, texts and joins."""

import unicodedata

import numpy as np
import pytest

from eclectus.tasks.evaluation import passages
from eclectus.tasks.evaluation.passages import Passages, seen_share


def brute_force(scored, trained, window):
    """The share by sets of windows of plain ASCII texts that need no normalisation."""
    seen = {text[at : at + window] for text in trained for at in range(len(text) - window + 1)}
    shares = []
    for text in scored:
        own = [text[at : at + window] in seen for at in range(len(text) - window + 1)]
        shares.append(np.mean(own) if own else np.nan)
    return np.array(shares)


def text_of(rng, size, letters="abcd"):
    return "".join(rng.choice(list(letters), size))


@pytest.mark.parametrize("window", [1, 3, 8, 50])
def test_shares_equal_a_search_over_all_windows(window, monkeypatch):
    monkeypatch.setattr(passages, "BLOCK", 64)
    monkeypatch.setattr(passages, "JOINED", 300)
    rng = np.random.default_rng(window)
    trained = [text_of(rng, size) for size in rng.integers(0, 400, 40)]
    scored = [text_of(rng, size) for size in rng.integers(0, 200, 20)]
    for number in range(10):
        source = trained[int(rng.integers(len(trained)))]
        start = int(rng.integers(max(1, len(source))))
        scored[number] += source[start : start + int(rng.integers(120))] + text_of(rng, 30, "xyz")
    scored += [trained[0], trained[0][5:], "", "a" * 51, trained[1] + trained[2]]
    np.testing.assert_array_equal(seen_share(scored, iter(trained), window), brute_force(scored, trained, window))


def test_no_window_crosses_from_one_text_into_the_next():
    left, right = "a" * 30 + "b" * 20, "c" * 20 + "d" * 30
    share = seen_share([left + right], [left, right], 50)
    assert share == 2 / 51


def test_a_changed_letter_costs_the_windows_that_hold_it_and_a_moved_text_none():
    rng = np.random.default_rng(0)
    text = text_of(rng, 1000, "abcdefghij")
    changed = text[:500] + "X" + text[501:]
    assert seen_share([changed], ["before " + text + " after"]) == pytest.approx(1 - 50 / 951)


def test_case_white_space_and_composition_do_not_hide_a_copy():
    text = "Ἀρχὴ σοφίας  φόβος Κυρίου,\nÇok güzel bir gün; straße Über alles mögliche geredet. " * 3
    for copy in (text.upper().lower(), unicodedata.normalize("NFD", text), text.replace(" ", "\n\t ")):
        assert seen_share([text], [copy]) == 1
    assert seen_share([text.encode()], [text]) == 1


def test_texts_shorter_than_a_window_have_no_share_and_nothing_trained_is_no_overlap():
    short, long = seen_share(["tiny", "x y " * 30], [])
    assert np.isnan(short) and long == 0
    assert len(seen_share([], ["a text of training " * 9])) == 0
    with pytest.raises(ValueError, match="at least 1 byte"):
        seen_share(["a"], ["a"], 0)


def test_bytes_that_are_no_utf8_and_lone_surrogates_are_compared_all_the_same():
    broken = b"\xff\xfe" + bytes(range(256)) * 2
    assert seen_share([broken, "\ud800 lone" * 20], [broken, "\ud800 lone" * 20]).tolist() == [1, 1]


def test_progress_counts_the_texts_read():
    looked = Passages(["a scored text " * 9])
    assert list(looked.look(f"text {number} " * 100 for number in range(2000)))[-1] == 2000

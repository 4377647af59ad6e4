import datetime
import decimal
import sys
import unicodedata
import uuid

import numpy as np
import pytest

from eclectus.tasks.documents.normalise import composed, id_of, label_of, normalised
from eclectus.tasks.evaluation.passages import hash_words

FORMS = ("NFC", "NFD", "NFKC", "NFKD")
TEXTS = {
    "tr": "İstanbul'da ışıl ışıl bir gökyüzü; ÇĞİÖŞÜ çğıöşü.",
    "el": "Ὁ ἄνθρωπος ἐν τῇ ΑΘΉΝΑΙ· ΰ ΐ, άέήίόύώ; τέλος ΤΈΛΟΣ.",
    "hu": "Árvíztűrő tükörfúrógép, ŐŰ.",
    "vi": "Tiếng Việt: một hai ba bốn, Ệ Ữ Ặ.",
    "hi": "क़ ख़ ग़ हिन्दी में लिखा हुआ पाठ।",
    "ko": "한국어로 쓴 글입니다.",
    "zh": "中國，（全形）ＡＢＣ１２３ 豈更車。",
    "ja": "ﾊﾞﾝｸﾞﾗﾃﾞｼｭ バングラデシュ が ぎ",
    "de": "Straße, MASSE, Äpfel & ﬁn, Nr. ² ½",
}


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("form", FORMS)
def test_twins_in_every_unicode_form_are_the_same_text_and_have_the_same_words(language, form):
    text, twin = TEXTS[language], unicodedata.normalize(form, TEXTS[language])
    assert normalised(twin) == normalised(text)
    assert composed(twin) == composed(text)
    assert np.array_equal(hash_words(twin), hash_words(text)) and len(hash_words(text)) >= 3


def test_texts_that_read_the_same_are_the_same_and_others_are_not():
    assert normalised("  A\u00a0ﬁne\tday \n") == normalised("a fine day") == "a fine day"
    assert normalised("co\u00adop\u200berate\ufeff") == "cooperate"
    assert normalised("ΣΊΣΥΦΟΣ") == normalised("σίσυφος")
    assert normalised("STRASSE") == normalised("straße")
    assert len({normalised(text) for text in ("kışın", "kisin", "kişin", "kısın")}) == 4
    assert composed("A B") == "A B" and composed("Ａ\u00a0B\n") == "A B\n"


def _changes(character):
    return unicodedata.decomposition(character) or character.casefold() != character or unicodedata.combining(character)


def test_every_code_point_that_decomposes_folds_or_combines_has_one_form_that_stays():
    points = [chr(point) for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000]
    points = [*filter(_changes, points), *map(chr, range(0xAC00, 0xD7A4, 97)), "\u00ad", "\u200d", "\ufe0f"]
    assert len(points) > 7_000
    for begin in range(0, len(points), 256):
        text = " x".join(points[begin : begin + 256])
        after = " ".join(f"a{point}\u0301" for point in points[begin : begin + 256])
        for each in (text, after):
            decomposed = unicodedata.normalize("NFD", each)
            assert normalised(decomposed) == normalised(each) == normalised(normalised(each))
            assert composed(decomposed) == composed(each) == composed(composed(each))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        (uuid.UUID(int=2**127 + 255).bytes, str(uuid.UUID(int=2**127 + 255))),
        (b"\xff\x00\x01", "ff0001"),
        (b"plain", "plain"),
        ("ελ".encode(), "ελ"),
        (1e18, "1000000000000000000"),
        (float(2**70), str(2**70)),
        (0.25, "0.25"),
        (decimal.Decimal("12345678901234567890.10"), "12345678901234567890.10"),
        (datetime.date(2024, 2, 29), "2024-02-29"),
        (10**30, "1" + "0" * 30),
        (b"", None),
        (None, None),
    ],
)
def test_ids_of_every_type_are_written_without_loss(value, text):
    assert id_of(value) == label_of(value) == text


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), decimal.Decimal("NaN"), True, [], {}, object()])
def test_what_names_nothing_is_no_label(value):
    with pytest.raises(ValueError, match=r"^an? |not a finite"):
        label_of(value)

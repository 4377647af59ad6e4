"""Language codes: every way to write a language gives one code, and the same one as in artifacts that exist already."""

import hashlib
import itertools
import json
import string

import pytest

from eclectus.tasks.documents.language_codes import UNDETERMINED, is_language, language_name, normalise


@pytest.mark.parametrize(
    ("code", "written"),
    {
        "el": ["el", "EL", " el ", "ell", "gre", "el-GR", "ell_Grek", "Greek"],
        "zh": ["zh", "zh-cn", "zho", "chi", "cmn", "cmn_Hans", "Chinese"],
        "he": ["he", "iw", "heb", "heb_Hebr"],
        "tl": ["tl", "tgl", "fil"],
        "tw": ["tw", "twi"],
        "ku": ["ku", "kur", "kmr_Latn", "ckb_Arab"],
        "fa": ["fa", "per", "pes_Arab", "prs", "Persian"],
        "bn": ["bn", "ben", "Bengali"],
        "ceb": ["ceb", "ceb_Latn"],
        "als": ["als"],
        UNDETERMINED: ["und", "un", "xxx"],
    }.items(),
)
def test_all_ways_to_write_a_language_give_one_code(code, written):
    assert {each: normalise(each) for each in written} == dict.fromkeys(written, code)


@pytest.mark.parametrize("word", [None, "", "12", "greek!", "klingon", "unknown", "e l", "-el", "ελ", "\0", "x" * 1000])
def test_what_is_no_language_gives_none(word):
    assert normalise(word) is None


def test_the_codes_of_existing_artifacts_stay_when_langcodes_is_upgraded():
    letters = string.ascii_lowercase
    words = ["".join(each) for count in (2, 3) for each in itertools.product(letters, repeat=count)]
    codes = {word: normalise(word) for word in words}
    two_letters = {code for code in codes.values() if code and len(code) == 2}
    assert len(two_letters) == 184 and all(normalise(code) == code for code in two_letters - {"bh"})
    assert hashlib.sha256(json.dumps(codes).encode()).hexdigest() == (
        "12500f5536b0aa17b98f5dbab638f00dc136c9e8b44eaccaf544f607081f8db7"
    )


def test_a_word_in_a_file_name_is_a_language_only_if_it_cannot_be_anything_else():
    assert is_language("el") and is_language("EL") and is_language("ell_Grek") and is_language("zh-Hans")
    assert not any(is_language(word) for word in ("fin", "code", "en-us", "iw", ""))


def test_languages_have_english_names_and_other_words_stay():
    assert [language_name(code) for code in ("el", "zh", "bn", "ca")] == ["Greek", "Chinese", "Bengali", "Catalan"]
    assert [language_name(word) for word in ("ceb", "und", "law", "all text")] == ["ceb", "und", "law", "all text"]

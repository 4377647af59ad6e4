"""Language codes: every way to write a language gives one code, and the same one as in artifacts that exist already."""

import hashlib
import itertools
import json
import string

import pytest

from eclectus.tasks.documents.language_codes import (
    UNDETERMINED,
    is_language,
    language_name,
    members_of,
    normalise,
    read_language,
    shortened,
)

FASTTEXT = """
    af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb co cs cv cy da de diq dsb
    dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id ie ilo io is it
    ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr mrj ms mt mwl my
    myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn sco sd si sk
    sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu xal xmf yi yo yue zh
""".split()


@pytest.mark.parametrize(
    ("code", "written"),
    {
        "el": ["el", "EL", " el ", "ell", "gre", "el-GR", "ell_Grek", "Greek", "Ελληνικά", "Greek, Modern (1453-)"],
        "zh": ["zh", "zh-cn", "zho", "chi", "cmn", "cmn_Hans", "Chinese", "zh-Hans", "zh_TW", "中文", "Mandarin"],
        "he": ["he", "iw", "heb", "heb_Hebr", "Hebrew", "עברית"],
        "tl": ["tl", "tgl", "fil", "Filipino", "Tagalog"],
        "de": ["Deutsch", "GERMAN", "deu", "ger", "de_DE.UTF-8", "German language", "de-CH-1996"],
        "fr": ["français", "franc\u0327ais", "Français (Canada)", "fra", "fre"],
        "en": ["ENGLISH", "eng_Latn", "en-US", "English (US)", "english\n"],
        "no": ["no", "nb", "nor", "nob", "nb-NO", "Norwegian", "norsk", "Norwegian Bokmål", "nob_Latn"],
        "nn": ["nn", "nno", "Nynorsk", "nn-NO"],
        "sr": ["sr", "sr-Latn", "sr@latin", "sh", "Serbian (Latin)", "српски"],
        "pt": ["pt-BR", "Brazilian Portuguese", "Português"],
        "yue": ["yue", "zh-yue", "Cantonese", "yue_Hant"],
        "arz": ["arz", "Egyptian Arabic", "ar-arz"],
        "nan": ["nan", "zh-min-nan"],
        "id": ["in", "id", "Bahasa Indonesia"],
        "es": ["Spanish; Castilian", "Castilian", "spa", "es-419"],
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


@pytest.mark.parametrize(
    "word",
    [
        None,
        "",
        "12",
        "greek!",
        "klingon",
        "unknown",
        "e l",
        "-el",
        "ελ",
        "\0",
        "x" * 1000,
        "Java",
        "JavaScript",
        "C",
        "legal",
        "foreign",
        "email",
        "more",
        "Even",
        "multilingual",
        "xyz",
        "non_english",
        "web",
    ],
)
def test_what_is_no_language_gives_none(word):
    assert normalise(word) is None


def test_the_codes_of_existing_artifacts_stay_when_langcodes_is_upgraded():
    letters = string.ascii_lowercase
    words = ["".join(each) for count in (2, 3) for each in itertools.product(letters, repeat=count)]
    codes = {word: normalise(word) for word in words}
    two_letters = {code for code in codes.values() if code and len(code) == 2}
    assert len(two_letters) == 183 and all(normalise(code) == code for code in two_letters - {"bh"})
    assert hashlib.sha256(json.dumps(codes).encode()).hexdigest() == (
        "cea6c6efc5e44bc3e72786c4053e356d10804c8d6b1727ab4561c24a3d9b37c8"
    )


def test_a_word_in_a_file_name_is_a_language_only_if_it_cannot_be_anything_else():
    assert is_language("el") and is_language("EL") and is_language("ell_Grek") and is_language("zh-Hans")
    assert not any(is_language(word) for word in ("fin", "code", "en-us", "iw", ""))


def test_languages_have_english_names_and_other_words_stay():
    assert [language_name(code) for code in ("el", "zh", "bn", "ca")] == ["Greek", "Chinese", "Bengali", "Catalan"]
    assert [language_name(word) for word in ("ceb", "und", "law", "all text")] == ["ceb", "und", "law", "all text"]


def test_the_codes_of_detectors_stay_what_they_were():
    assert {code: normalise(code) for code in FASTTEXT if normalise(code) != code} == {"bh": "bho"}
    assert normalise("ckb") == "ku" and normalise("sh") == "sr"


@pytest.mark.parametrize(("word", "near"), {"Germn": "'de'", "Englsh": "'en'", "greek!": "'el'", "zz": "'el'"}.items())
def test_an_unknown_language_is_refused_with_what_is_near(word, near):
    with pytest.raises(ValueError, match=f"'{word}' is no language code or name; .*{near}"):
        read_language(word)


def test_the_members_of_a_macrolanguage_are_those_with_their_own_code():
    assert {"arz", "ary"} <= members_of("ar") and "ar" not in members_of("ar")
    assert members_of("no") == {"nn"} and "yue" in members_of("zh") and members_of("el") == set()


def test_a_shown_label_is_one_short_line():
    assert shortened("a\nb\x1b[31m") == "a b [31m"
    assert shortened("x" * 20_000) == "x" * 59 + "…" and shortened("x" * 60) == "x" * 60

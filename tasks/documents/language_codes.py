"""Language codes: ISO 639-1 if the language has such a code, else ISO 639-3, whatever a record or a detector gives.

`ell_Grek`, `gre`, `EL`, `el-GR`, `Greek` and `Ελληνικά` all become `el`; `zh-cn`, `cmn` and `Chinese (Simplified)`
become `zh`, `nb` becomes `no`. Settings, records and detectors are read by this one function, so that they agree.

    member of a macrolanguage   the macrolanguage's code if corpora and detectors mean the same by both (`nb`, `cmn`,
                                `arb`, `swh`); those that detectors tell apart keep their own (`nn`, `yue`, `arz`)
    name                        English or the language's own, exactly as CLDR has it (library langcodes), of languages
                                with speakers: names of others are words like Even, Label, Art

`standardize_tag` of langcodes is not used: it turns `als`, fastText's code for Alemannic, into Albanian, Tagalog into
`fil` and Twi into `ak`, and leaves `ckb` as it is. _ALIASES has what differs.
"""

from __future__ import annotations

import difflib
import functools
import logging
import re
import unicodedata
from typing import Any

from langcodes import Language
from langcodes.data_dicts import LANGUAGE_ALPHA3, LANGUAGE_ALPHA3_BIBLIOGRAPHIC, MACROLANGUAGES

UNDETERMINED = "und"
LONGEST_NAME = 100
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# Withdrawn codes, detectors' codes for "unknown", and members of macrolanguages that corpora and detectors use.
_ALIASES = dict(
    pair.split("=")
    for pair in """
        arb=ar azj=az bh=bho ckb=ku cmn=zh ekk=et fil=tl gug=gn in=id iw=he ji=yi jw=jv khk=mn kmr=ku lvs=lv mo=ro
        nb=no nob=no npi=ne ory=or pbt=ps pes=fa plt=mg prs=fa quy=qu sh=sr swh=sw un=und uzn=uz xxx=und ydd=yi zsm=ms
    """.split()
)
_WITHDRAWN = {"in", "iw", "ji", "jw", "mo", "sh"}
_ISO_639_1 = {code for code in LANGUAGE_ALPHA3 if len(code) == 2} - _WITHDRAWN
_TO_ISO_639_1 = {
    **{LANGUAGE_ALPHA3[code]: code for code in _ISO_639_1},
    **{three: code for code, three in LANGUAGE_ALPHA3_BIBLIOGRAPHIC.items()},
    **_ALIASES,
}
# Codes that detectors and collections use, but ISO 639-3 does not have or no longer has as a language.
_COLLECTIONS = {"eml", "nah", "bih", "ber"}
# Names of languages, in some language, that mean something else in a field or setting.
_OTHER_WORDS = {"java", "male", "mono", "more", "multilingual"}
_WIKIPEDIA = {"zh_min_nan": "nan", "zh_yue": "yue", "zh_classical": "lzh"}


def normalise(written: str | None) -> str | None:
    """The language that a code, tag or name stands for, or None if it is none of these."""
    if not written or len(written) > LONGEST_NAME:
        return None
    return _normalise(unicodedata.normalize("NFC", written).strip())


@functools.lru_cache(maxsize=10_000)
def _normalise(written: str) -> str | None:
    return _of_code(written) or _of_name(written)


def read_language(written: str) -> str:
    """The code of a language in a setting; a name or another code is logged as read. Raises ValueError if unknown."""
    code = normalise(written)
    if code is None:
        close = near_names(written)
        hint = f"; did you mean {close}?" if close else ""
        raise ValueError(
            f"'{shortened(written)}' is no language code or name; expected ISO 639-1, such as 'en' or 'el'{hint}"
        )
    if written.strip().lower() != code:
        _log_reading(written.strip(), code)
    return code


@functools.cache
def _log_reading(written: str, code: str) -> None:
    """Once per process, for settings are read several times."""
    logging.getLogger("eclectus").warning("language '%s' is read as '%s' (%s)", written, code, language_name(code))


def near_names(word: str) -> str:
    """The known codes and names most similar to a word, as `'el' (Greek), 'hu' (Hungarian)`; empty if none is near."""
    codes = [code for code in sorted(_ISO_639_1) if normalise(code) == code]
    names = {name(code).casefold(): code for name in (_own_name, language_name) for code in codes}
    close = difflib.get_close_matches(word.strip().casefold()[:LONGEST_NAME], names, n=3, cutoff=0.6)
    return ", ".join(dict.fromkeys(f"'{names[each]}' ({language_name(names[each])})" for each in close))


def _own_name(code: str) -> str:
    return Language.get(code).autonym()


def members_of(code: str) -> set[str]:
    """The languages that ISO 639-3 counts to this macrolanguage and that keep their own code here: ar -> arz, ..."""
    return {member for member, macro in MACROLANGUAGES.items() if macro == code and normalise(member) == member}


def shortened(label: str, longest: int = 60) -> str:
    """A label for one line of a display: line breaks, control and direction marks as blanks, cut by an ellipsis."""
    line = _UNSHOWN.sub(" ", label[: longest + 1])
    return line if len(label) <= longest else f"{line[: longest - 1]}…"


def _of_code(written: str) -> str | None:
    """The language of `el`, `ell`, `ell_Grek`, `zh-cn`, `zh-yue` or `en_US.UTF-8`; None for anything else."""
    tag = re.split(r"[.@]", written.lower())[0].replace("-", "_")
    if tag in _WIKIPEDIA:
        return _WIKIPEDIA[tag]
    main, *rest = tag.split("_")
    if rest and MACROLANGUAGES.get(rest[0]) == main:
        main, *rest = rest
    code = _TO_ISO_639_1.get(main, main)
    if len(main) == 3 and not all(re.fullmatch(r"[a-z]{4}|[a-z]{2}|\d{3}|x", part) for part in rest):
        return None
    return code if code in _ISO_639_1 or code == UNDETERMINED or _is_registered(code) else None


def _is_registered(code: str) -> bool:
    return bool(re.fullmatch(r"[a-z]{3}", code)) and (code in _COLLECTIONS or Language.get(code).is_valid())


def _of_name(written: str) -> str | None:
    """The language of `Greek`, `Ελληνικά`, `Chinese (Simplified)`, `Greek, Modern (1453-)` or `Greek language`."""
    name = re.sub(r"\s+", " ", written.split(";")[0]).strip()
    plain = re.sub(r"\s*\(.*\)$", "", name)
    turned = re.sub(r"^([^,]+), *([^,]+)$", r"\2 \1", plain)
    for each in (name, plain, re.sub(r"(?i) language$", "", plain), turned, plain.split(",")[0]):
        code = _of_exact_name(each)
        if code:
            return code
    return None


def _of_exact_name(name: str) -> str | None:
    from language_data.names import get_trie_value, normalize_name
    from language_data.population_data import LANGUAGE_SPEAKING_POPULATION as speakers

    key = normalize_name(name)
    # Two or three Latin letters are a code or nothing.
    if len(key) < (4 if key.isascii() else 2) or "\0" in key or key in _OTHER_WORDS:
        return None
    found = next((get_trie_value(names, key) for names in _names() if key in names), None)
    if found is None:
        return None
    main = found.split("-")[0]
    code = _of_code(main)
    return code if main in speakers or code in speakers or code in _ISO_639_1 else None


@functools.cache
def _names() -> list[Any]:
    """Names of languages to codes: the English ones, then those in any language."""
    from language_data.names import load_trie
    from language_data.util import data_filename

    return [load_trie(data_filename(f"trie/{language}/name_to_language.marisa")) for language in ("en", "und")]


def is_language(word: str) -> bool:
    """Whether a word in a file name is a language: only `el` and `ell_Grek`, because `fin` may mean finance."""
    return word.lower() in _ISO_639_1 or bool(re.fullmatch(r"[a-z]{2,3}[-_][A-Z][a-z]{3}", word))


def language_name(code: str) -> str:
    """The English name of an ISO 639-1 code; any other word as it is."""
    if code == "bn":
        return "Bengali"  # CLDR, and so langcodes, says Bangla.
    return Language.get(code).display_name("en") if code in _ISO_639_1 else code

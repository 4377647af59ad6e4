"""Language codes: ISO 639-1 if the language has such a code, else ISO 639-3, whatever a record or a detector gives.

`ell_Grek`, `gre`, `EL`, `el-GR` and `Greek` all become `el`; `zh-cn` and `cmn` become `zh`. The codes and the English
names come from the library langcodes. Its `standardize_tag` is not used: it turns `als`, fastText's code for
Alemannic, into Albanian, Tagalog into `fil` and Twi into `ak`, and leaves `ckb` as it is. _ALIASES has what differs.
"""

from __future__ import annotations

import functools
import re

from langcodes import Language
from langcodes.data_dicts import LANGUAGE_ALPHA3, LANGUAGE_ALPHA3_BIBLIOGRAPHIC

UNDETERMINED = "und"

# Withdrawn codes, detectors' codes for "unknown", and members of macrolanguages that corpora and detectors use.
_ALIASES = dict(
    pair.split("=")
    for pair in """
        arb=ar azj=az bh=bho ckb=ku cmn=zh ekk=et fil=tl gug=gn in=id iw=he ji=yi jw=jv khk=mn kmr=ku lvs=lv mo=ro
        npi=ne ory=or pbt=ps pes=fa plt=mg prs=fa quy=qu sh=sr swh=sw un=und uzn=uz xxx=und ydd=yi zsm=ms
    """.split()
)
_WITHDRAWN = {"in", "iw", "ji", "jw", "mo", "sh"}
_ISO_639_1 = {code for code in LANGUAGE_ALPHA3 if len(code) == 2} - _WITHDRAWN
_TO_ISO_639_1 = {
    **{LANGUAGE_ALPHA3[code]: code for code in _ISO_639_1},
    **{three: code for code, three in LANGUAGE_ALPHA3_BIBLIOGRAPHIC.items()},
    **_ALIASES,
}
# Records may name these by their English name; another word is no language.
_NAMED = "ar bn zh cs nl en fr de el hi hu id it ja ko ne fa pl pt ro ru es sv tr uk vi"


@functools.lru_cache(maxsize=10_000)
def normalise(code: str | None) -> str | None:
    """The language that a code or English name stands for, or None if it is neither."""
    if not code:
        return None
    main = re.split(r"[-_]", code.strip().lower())[0]
    main = _TO_ISO_639_1.get(main) or (_codes_by_name().get(main, main) if len(main) > 3 else main)
    return main if main in _ISO_639_1 or re.fullmatch(r"[a-z]{3}", main) else None


def is_language(word: str) -> bool:
    """Whether a word in a file name is a language: only `el` and `ell_Grek`, because `fin` may mean finance."""
    return word.lower() in _ISO_639_1 or bool(re.fullmatch(r"[a-z]{2,3}[-_][A-Z][a-z]{3}", word))


def language_name(code: str) -> str:
    """The English name of an ISO 639-1 code; any other word as it is."""
    if code == "bn":
        return "Bengali"  # CLDR, and so langcodes, says Bangla.
    return Language.get(code).display_name("en") if code in _ISO_639_1 else code


@functools.cache
def _codes_by_name() -> dict[str, str]:
    return {language_name(code).lower(): code for code in _NAMED.split()}

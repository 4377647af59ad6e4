"""Language codes: whatever a record, a setting or a detector says, as ISO 639-1 where it has a code, else ISO 639-3.

`ell_Grek`, `gre`, `EL`, `el-GR` and `Greek` are all `el`; `zh-cn` and `cmn` are `zh`. UNDETERMINED is the standard's own word
for "not known".
"""

from __future__ import annotations

import functools
import re

UNDETERMINED = "und"

# ISO 639-1 (two letters) and ISO 639-2/T (three), one pair a word, as the registration authority lists them.
_CODES = """
aaaar ababk aeave afafr akaka amamh anarg arara asasm avava ayaym azaze babak bebel bgbul bhbih bibis bmbam
bnben bobod brbre bsbos cacat ceche chcha cocos crcre csces cuchu cvchv cycym dadan dedeu dvdiv dzdzo eeewe
elell eneng eoepo esspa etest eueus fafas ffful fifin fjfij fofao frfra fyfry gagle gdgla glglg gngrn guguj
gvglv hahau heheb hihin hohmo hrhrv hthat huhun hyhye hzher iaina idind ieile igibo iiiii ikipk ioido isisl
itita iuiku jajpn jvjav kakat kgkon kikik kjkua kkkaz klkal kmkhm knkan kokor krkau kskas kukur kvkom kwcor
kykir lalat lbltz lglug lilim lnlin lolao ltlit lulub lvlav mgmlg mhmah mimri mkmkd mlmal mnmon mrmar msmsa
mtmlt mymya nanau nbnob ndnde nenep ngndo nlnld nnnno nonor nrnbl nvnav nynya ococi ojoji omorm orori ososs
papan pipli plpol pspus ptpor quque rmroh rnrun roron rurus rwkin sasan scsrd sdsnd sesme sgsag sisin skslk
slslv smsmo snsna sosom sqsqi srsrp ssssw stsot susun svswe swswa tatam tetel tgtgk ththa titir tktuk tltgl
tntsn toton trtur tstso tttat twtwi tytah uguig ukukr ururd uzuzb veven vivie vovol wawln wowol xhxho yiyid
yoyor zazha zhzho zuzul
"""
# Bibliographic codes, withdrawn codes, and members of macrolanguages that corpora and detectors use.
_ALIASES = """
alb=sq arb=ar arm=hy azj=az baq=eu bh=bho bur=my chi=zh ckb=ku cmn=zh cze=cs dut=nl ekk=et fil=tl fre=fr
geo=ka ger=de gre=el gug=gn ice=is in=id iw=he ji=yi jw=jv khk=mn kmr=ku lvs=lv mac=mk mao=mi may=ms mo=ro
nob=nb npi=ne ory=or pbt=ps per=fa pes=fa plt=mg prs=fa quy=qu rum=ro sh=sr slo=sk swh=sw tib=bo un=und uzn=uz
wel=cy xxx=und ydd=yi zsm=ms
"""
# English names of languages, as records sometimes give them.
_NAMES = """
arabic=ar bengali=bn chinese=zh czech=cs dutch=nl english=en french=fr german=de greek=el hindi=hi
hungarian=hu indonesian=id italian=it japanese=ja korean=ko nepali=ne persian=fa polish=pl portuguese=pt
romanian=ro russian=ru spanish=es swedish=sv turkish=tr ukrainian=uk vietnamese=vi
"""
_TWO = {word[:2] for word in _CODES.split()}
_TWO_OF_OTHER = {word[2:]: word[:2] for word in _CODES.split()} | dict(
    word.split("=") for word in (_ALIASES + _NAMES).split()
)


@functools.lru_cache(maxsize=10_000)
def normalise(code: str | None) -> str | None:
    """The language that a code or name means, or None if it means none."""
    if not code:
        return None
    main = re.split(r"[-_]", code.strip().lower())[0]
    main = _TWO_OF_OTHER.get(main, main)
    return main if main in _TWO or re.fullmatch(r"[a-z]{3}", main) else None


def is_language(word: str) -> bool:
    """Whether a word in a file's name stands for a language: only `el` and `ell_Grek`, for `fin` may mean finance."""
    return word.lower() in _TWO or bool(re.fullmatch(r"[a-z]{2,3}[-_][A-Z][a-z]{3}", word))


LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi",
    "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean",
    "ne": "Nepali", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "sk": "Slovak", "sl": "Slovenian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu",
    "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


def language_name(code: str) -> str:
    """The English name of a language, or its code where we know none."""
    return LANGUAGES.get(code, code)

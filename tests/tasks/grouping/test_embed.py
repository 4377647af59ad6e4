import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.disk_matrix import open_embeddings, open_ids
from eclectus.tasks.documents.table import read_table
from eclectus.tasks.grouping import embed as module_of_step
from eclectus.tasks.grouping.embed import EmbedSettings, embed, model_fingerprint
from eclectus.tasks.grouping.encoder import Encoder, digest_weights, in_half_precision
from eclectus.tasks.grouping.static_embedding import StaticEmbeddingSettings, train_embedding
from eclectus.tasks.grouping.static_model import WEIGHTS, StaticModel
from eclectus.tasks.run import Run, activate
from tests.support.topics import TOPICS, make, topical, write_documents

SMALL = StaticEmbeddingSettings(embedding_dimension=16, embedding_vocabulary=600, embedding_steps=5)
ROWS = topical(dict.fromkeys(TOPICS, 40))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    store = ArtifactStore(tmp_path_factory.mktemp("model"))
    return make(store, train_embedding, documents=write_documents(store, ROWS), settings=SMALL)


@pytest.fixture
def run(tmp_path):
    home = Home.open(tmp_path / "home")
    with activate(Run("r", home, Journal(home.journal, "r"), KnownKeys(home.keys, home.store))) as run:
        yield run


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    """A tiny BERT with mean pooling, as a sentence-transformers folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for row in ROWS for word in row["text"].split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    shape = BertConfig(
        vocab_size=len(words) + 5, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(shape).save_pretrained(folder)
    inner = Transformer(str(folder))
    SentenceTransformer(modules=[inner, Pooling(32)], device="cpu").save(str(folder / "model"), create_model_card=False)
    return folder / "model"


def vectors(artifact):
    return open_embeddings(artifact)[:]


@pytest.mark.slow
def test_embeddings_are_those_of_sentence_transformers(run, model):
    from sentence_transformers import SentenceTransformer

    artifact = embed(documents=write_documents(run.home.store, ROWS), model=model, settings=EmbedSettings())
    expected = SentenceTransformer(model.path, device="cpu").encode([row["text"] for row in ROWS])
    assert np.allclose(vectors(artifact), expected, atol=1e-6)
    assert np.allclose(np.linalg.norm(vectors(artifact), axis=1), 1, atol=1e-6)
    assert artifact.statistics["documents"] == len(ROWS)
    assert artifact.statistics["reused"] == 0


def test_row_i_is_the_unit_mean_vector_of_document_i(run, model):
    artifact = embed(documents=write_documents(run.home.store, ROWS), model=model, settings=EmbedSettings())
    means = StaticModel.load(Path(model.path)).encode([row["text"] for row in ROWS])
    assert np.allclose(vectors(artifact), means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-6)
    assert artifact.statistics["documents"] == len(ROWS)
    assert artifact.statistics["reused"] == 0


def test_only_new_documents_are_computed_and_the_bits_are_the_same(run, model, tmp_path):
    store = run.home.store
    embed(documents=write_documents(store, ROWS[:150]), model=model, settings=EmbedSettings())
    grown = embed(documents=write_documents(store, ROWS[::-1]), model=model, settings=EmbedSettings())
    assert grown.statistics["reused"] == 150
    fresh = make(
        ArtifactStore(tmp_path / "fresh"),
        embed,
        documents=write_documents(store, ROWS[::-1]),
        model=model,
        settings=EmbedSettings(),
    )
    assert grown.digest == fresh.digest


def test_a_grown_corpus_finds_its_parts_and_copies_what_moved_to_others(run, model):
    store = run.home.store
    first = embed(documents=write_documents(store, ROWS[:150], 3), model=model, settings=EmbedSettings())
    assert first.file("embeddings/part-00002.npy").is_file() and not first.file("embeddings.npy").exists()
    assert vectors(first).shape == (150, 16) and len(open_ids(first)) == 150
    again = embed(documents=write_documents(store, ROWS[:150], 3), model=model, settings=EmbedSettings())
    assert again.digest == first.digest and len(list((run.home.work / "parts").glob("*/*"))) == 3
    other = embed(documents=write_documents(store, ROWS[20:170], 2), model=model, settings=EmbedSettings())
    assert other.statistics["reused"] == 130
    whole = embed(documents=write_documents(store, ROWS[20:170]), model=model, settings=EmbedSettings())
    assert np.array_equal(vectors(other), vectors(whole))


def test_a_resumed_run_finds_the_parts_that_were_made(run, model):
    documents = write_documents(run.home.store, ROWS, 4)
    whole = embed(documents=documents, model=model, settings=EmbedSettings())
    shutil.rmtree(whole.path)
    made = sorted((run.home.work / "parts").glob("*/*"))
    assert len(made) == 4
    shutil.rmtree(made[0])
    again = embed(documents=documents, model=model, settings=EmbedSettings())
    assert again.digest == whole.digest and again.statistics["reused"] == 150


def test_other_limits_or_a_damaged_artifact_are_not_reused(run, model):
    documents = write_documents(run.home.store, ROWS[:50])
    first = embed(documents=documents, model=model, settings=EmbedSettings())
    short = embed(documents=documents, model=model, settings=EmbedSettings(embedding_maximum_characters=40))
    assert short.statistics["reused"] == 0
    assert not np.array_equal(vectors(first), vectors(short))
    first.file("embeddings.npy").write_bytes(b"gone")
    shutil.rmtree(run.home.work / "parts")
    again = embed(documents=documents, model=model, settings=EmbedSettings())
    assert again.statistics["reused"] == 0
    assert again.digest == first.digest


def test_half_precision_and_documents_without_a_word(run, model):
    rows = [*ROWS[:20], {"text": "", "language": "en"}, {"text": "   ", "language": "en"}]
    settings = EmbedSettings(embedding_precision="float16")
    artifact = embed(documents=write_documents(run.home.store, rows), model=model, settings=settings)
    assert vectors(artifact).dtype == np.float16
    assert (vectors(artifact)[20:] == 0).all()
    assert artifact.statistics["without_embedding"] == 2


def with_weights(model, folder, change):
    """A copy of the static model with changed token vectors [V, D]."""
    shutil.copytree(model.path, folder)
    static = StaticModel.load(folder)
    change(static.weights)
    save_file({"embedding.weight": static.weights}, folder / WEIGHTS)
    return EmbedSettings(embedding_model=str(folder))


@pytest.mark.parametrize(("value", "words"), [(np.nan, "not finite for 50 documents"), (0, "zero for 50")])
def test_a_model_without_usable_embeddings_ends_the_run_and_is_named(run, model, tmp_path, value, words):
    settings = with_weights(model, tmp_path / "broken", lambda weights: weights.fill(value))
    documents = write_documents(run.home.store, ROWS[:50])
    with pytest.raises(EclectusError, match=r"'.*broken' gives no usable embedding for 50 of 50 documents") as raised:
        embed(documents=documents, settings=settings)
    assert words in str(raised.value) and read_table(documents)["document"][0].as_py() in str(raised.value)
    with pytest.raises(EclectusError, match="no usable embedding"):
        embed(documents=documents, settings=settings.model_copy(update={"embedding_missing_share": 1.0}))


@pytest.mark.parametrize("count", [1, 2])
def test_a_corpus_of_which_no_document_has_an_embedding_is_refused_however_small(run, model, tmp_path, count):
    settings = with_weights(model, tmp_path / "broken", lambda weights: weights.fill(np.inf))
    with pytest.raises(EclectusError, match="no usable embedding"):
        embed(documents=write_documents(run.home.store, ROWS[:count]), settings=settings)


def test_few_documents_without_an_embedding_are_reported_and_embedded_again_by_the_next_run(run, model, tmp_path):
    token = StaticModel.load(Path(model.path)).tokenizer.encode("zyzzyva", add_special_tokens=False).ids

    def spoil(weights):
        weights[token[-1]] = np.nan

    heard = []
    run.displays.append(
        SimpleNamespace(
            step_began=print, step_ended=print, step_progressed=print, notified=lambda name, text: heard.append(text)
        )
    )
    settings = with_weights(model, tmp_path / "spoilt", spoil)
    static, rows = StaticModel.load(tmp_path / "spoilt"), [*ROWS[:100], {"text": "zyzzyva", "language": "en"}]
    lacking = int((~np.isfinite(static.encode([row["text"] for row in rows])).all(axis=1)).sum())
    assert 1 <= lacking <= 10
    artifact = embed(documents=write_documents(run.home.store, rows), settings=settings)
    assert (vectors(artifact)[-1] == 0).all() and artifact.statistics["without_embedding"] == lacking
    assert (
        f"{lacking} of 101 documents have no usable embedding" in heard[0] and f"not finite for {lacking}" in heard[0]
    )
    again = embed(documents=write_documents(run.home.store, rows[::-1]), settings=settings)
    assert again.statistics["reused"] == 101 - lacking and again.statistics["without_embedding"] == lacking


def test_embeddings_that_an_earlier_version_stored_as_zeros_are_not_reused(run, model):
    documents = write_documents(run.home.store, ROWS[:50])
    good = embed(documents=documents, model=model, settings=EmbedSettings())
    stored = vectors(good)
    stored[7] = 0
    with run.home.store.draft("embeddings") as out:
        np.save(out.file("embeddings.npy"), stored)
        np.save(out.file("ids.npy"), np.load(good.file("ids.npy")))
        out.statistics = {**good.statistics, "without_embedding": 1}
        run.home.store.commit(out)
    shutil.rmtree(good.path)
    shutil.rmtree(run.home.work / "parts")
    again = embed(documents=documents, model=model, settings=EmbedSettings())
    assert again.digest == good.digest and again.statistics["reused"] == 49


def test_what_is_not_finite_becomes_zero(model):
    encoder = Encoder(model.path, EmbedSettings())
    encoder.model.weights[:] = np.nan
    assert (encoder.encode(["harbour sail"]) == 0).all()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_head")
def test_a_transformer_in_ray_and_here_in_several_pieces(run, transformer, monkeypatch):
    """Slow: Ray, and imports of sentence-transformers."""
    documents = write_documents(run.home.store, ROWS, 2)
    settings = EmbedSettings(embedding_model=str(transformer), embedding_batch=8, embedding_workers=2)
    monkeypatch.setattr(module_of_step, "PIECE", 64)
    artifact = embed(documents=documents, settings=settings)
    encoder = Encoder(str(transformer), settings)
    assert np.allclose(vectors(artifact), encoder.encode([row["text"] for row in ROWS]), atol=1e-5)
    assert len(list((run.home.work / "parts").glob("*/*"))) == 4
    shutil.rmtree(run.home.work / "parts")
    shutil.rmtree(artifact.path)
    here = embed(documents=documents, settings=settings.model_copy(update={"embedding_workers": 1}))
    assert here.digest == artifact.digest
    half = Encoder(str(transformer), settings)
    half.model = in_half_precision(half.model)
    cosines = (half.encode([row["text"] for row in ROWS]) * vectors(artifact)).sum(axis=1)
    assert half.model.dtype == torch.bfloat16 and (cosines > 0.999).all()
    assert digest_weights(str(transformer)) == digest_weights(str(transformer))


def test_a_gpu_that_is_not_there_is_one_clear_line(run, model, monkeypatch):
    monkeypatch.setattr("eclectus.tasks.ray_cluster.ensure_ray", lambda: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(module_of_step, "is_static_model", lambda folder: False)
    with pytest.raises(EclectusError, match="Ray has no GPU"):
        embed(
            documents=write_documents(run.home.store, ROWS[:5]),
            model=model,
            settings=EmbedSettings(embedding_device="cuda"),
        )


def test_a_changed_model_folder_is_a_changed_input(tmp_path):
    (tmp_path / "modules.json").write_text("[]")
    settings = EmbedSettings(embedding_model=str(tmp_path))
    before = model_fingerprint(settings)
    (tmp_path / "note.txt").write_text("changed")
    assert model_fingerprint(settings) != before
    assert model_fingerprint(EmbedSettings()) == {}


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_one_clear_line(run, tmp_path):
    (tmp_path / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "no.such.Module"}]')
    with pytest.raises(EclectusError, match="cannot be loaded as a sentence-transformers model") as raised:
        embed(
            documents=write_documents(run.home.store, ROWS[:5]), settings=EmbedSettings(embedding_model=str(tmp_path))
        )
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_head")
def test_workers_and_this_process_give_a_static_model_the_same_bits(run, model, tmp_path):
    documents = write_documents(run.home.store, ROWS, 3)
    here = make(ArtifactStore(tmp_path / "here"), embed, documents=documents, model=model, settings=EmbedSettings())
    actors = embed(documents=documents, model=model, settings=EmbedSettings(embedding_workers=2))
    assert actors.digest == here.digest


def test_no_document_gives_an_empty_matrix(run, model):
    artifact = embed(documents=write_documents(run.home.store, []), model=model, settings=EmbedSettings())
    assert len(vectors(artifact)) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (EmbedSettings(), "pass model=train_embedding"),
        (EmbedSettings(embedding_model="./no/such-model"), "is no folder"),
        (EmbedSettings(embedding_model="tests"), "no modules.json"),
    ],
)
def test_a_missing_model_is_one_clear_line(run, settings, words):
    documents = write_documents(run.home.store, ROWS[:5])
    with pytest.raises(EclectusError, match=words) as raised:
        embed(documents=documents, settings=settings)
    assert "\n" not in str(raised.value)


KILLED = """
import sys
from eclectus.storage.artifact import Artifact
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.grouping.embed import EmbedSettings, embed
from eclectus.tasks.run import Run, activate

folder, name, model = sys.argv[1:]
home = Home.open(folder)
with activate(Run("killed", home, Journal(home.journal, "killed"), KnownKeys(home.keys, home.store))):
    settings = EmbedSettings(embedding_model=model, embedding_batch=1, embedding_workers=1)
    print(embed(documents=home.store.find(name), settings=settings).statistics["reused"], flush=True)
"""


def _finished(home):
    return len(list(home.work.glob("parts/*/*/part.json")))


@pytest.mark.slow
def test_a_run_killed_while_it_embeds_loses_at_most_the_pieces_it_was_at(tmp_path, transformer):
    """Slow: two processes that import sentence-transformers."""
    home = Home.open(tmp_path / "home")
    documents = write_documents(home.store, topical(dict.fromkeys(TOPICS, 1500)))
    command = [sys.executable, "-c", KILLED, str(home.root), documents.name, str(transformer)]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while _finished(home) < 1:
        assert killed.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    finished = _finished(home)
    assert not list(home.store.root.glob("embeddings/*"))
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(again.stdout) >= 2000 * finished > 0
    (whole,) = home.store.root.glob("embeddings/*/embeddings.npy")
    assert np.allclose(np.linalg.norm(np.load(whole), axis=1), 1, atol=1e-6)


def test_a_static_model_with_another_tokenizer_or_a_damaged_one_is_one_line(model, tmp_path):
    shutil.copytree(model.path, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["model"]["vocab"]["zzz"] = 10**6
    path.write_text(json.dumps(whole))
    with pytest.raises(EclectusError, match=r"tokenizer.json has token id 1000000.*not the model's"):
        StaticModel.load(tmp_path / "model")
    path.write_text("{")
    with pytest.raises(EclectusError, match=r"tokenizer.json cannot be read"):
        StaticModel.load(tmp_path / "model")

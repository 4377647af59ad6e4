"""Evaluation: equal to an independent computation for any batch; every model on the same tokens; bad input named."""

import json
import math
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from eclectus.models.pretraining.export_dense import prompt_routing_weights
from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.table import read_table
from eclectus.tasks.evaluation.evaluate import EvaluateSettings, evaluate
from eclectus.tasks.packing.tokenizer import TokenizerSettings, load_tokenizer, tokenizer
from tests.support.small_world import LENGTH, SEGMENT, make_world, texts, write_documents, write_model
from tests.support.tokenizers import byte_level, llama
from tests.support.tokenizers import words as words_only

SETTINGS = {
    "evaluation_context": SEGMENT,
    "evaluation_prompt_tokens": 12,
    "evaluation_sample_tokens": 6,
    "training_workers": 0,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def run(world, checkpoint, documents=None, tokens=None, **settings) -> Artifact:
    with world.store.draft("evaluation") as draft:
        evaluate.function(
            documents or world.documents,
            tokens or world.tokenizer,
            checkpoint,
            EvaluateSettings(**{**SETTINGS, **settings}),
            draft,
        )
        return world.store.commit(draft)


@pytest.fixture(scope="module")
def evaluations(world):
    return {name: run(world, checkpoint) for name, checkpoint in world.models.items()}


def rows(artifact, name="documents"):
    return pq.read_table(artifact.file(f"{name}.parquet")).to_pylist()


def lead(world, words, language, domain):
    """The end of the training document with the lowest id of those that are long enough, as context of a stream."""
    train = [("split", "==", "train"), ("language", "==", language), ("domain", "==", domain)]
    table = read_table(world.documents, ["document", "bytes", "text"], train).to_pylist()
    first = min(table, key=lambda each: (each["bytes"] < 16 * SEGMENT, each["document"]))
    return [*words(first["text"], add_special_tokens=False)["input_ids"], words.eos_token_id][-SEGMENT:]


def bits_token_by_token(world, checkpoint, language, domain, begin=()) -> tuple[float, float]:
    """(bits, bytes) of the first two documents of a stream, with one forward pass per token over its own window."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path).eval()
    words = load_tokenizer(world.tokenizer.path)
    held = [("split", "==", "heldout"), ("language", "==", language), ("domain", "==", domain)]
    documents = sorted(
        read_table(world.documents, ["document", "text"], held).to_pylist(), key=lambda d: d["document"]
    )[:2]
    stream = lead(world, words, language, domain)
    weights = [None] * len(stream)
    for document in documents:
        ids = words(document["text"], add_special_tokens=False)["input_ids"]
        stream += [*begin, *ids, words.eos_token_id]
        weights += [None] * len(begin) + [len(document["text"].encode()) / len(ids)] * len(ids) + [None]
    bits = size = 0.0
    for at in range(SEGMENT, len(stream)):
        if weights[at] is None:
            continue
        start = (at - SEGMENT) // (LENGTH - SEGMENT) * (LENGTH - SEGMENT)
        window = torch.tensor([[*begin, *stream[start + len(begin) : min(start + LENGTH, len(stream))]]])
        with torch.no_grad():
            logits = model(input_ids=window).logits[0, at - start - 1].double()
        bits += float(-logits.log_softmax(-1)[stream[at]]) / math.log(2)
        size += weights[at]
    return bits, size


@pytest.mark.parametrize(
    ("name", "rule"),
    [("dense", "auto"), ("lory", "auto"), ("stage 2", "auto"), ("dense", "always"), ("lory", "always")],
)
def test_bits_per_byte_equal_those_of_an_independent_computation(world, name, rule):
    begin = [load_tokenizer(world.tokenizer.path).bos_token_id] if rule == "always" else []
    evaluation = run(world, world.models[name], evaluation_documents=2, begin_of_document=rule)
    bits, size = bits_token_by_token(world, world.models[name], "el", "interface", begin)
    row = next(row for row in rows(evaluation, "scores") if row["level"] == "domain" and row["domain"] == "interface")
    assert row["bits_per_byte"] == pytest.approx(bits / size, rel=1e-6)
    assert row["bytes"] == pytest.approx(size, rel=1e-9)
    assert row["perplexity"] == pytest.approx(2 ** (bits / row["tokens"]), rel=1e-6)


@pytest.mark.parametrize("name", ["dense", "lory", "stage 2"])
def test_scores_do_not_depend_on_the_batch_size(world, evaluations, name):
    for batch in (1, 3):
        other = run(world, world.models[name], evaluation_batch=batch)
        for one, two in zip(rows(evaluations[name], "scores"), rows(other, "scores"), strict=True):
            assert two["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-6)
        for one, two in zip(rows(evaluations[name], "routing"), rows(other, "routing"), strict=True):
            assert two["share"] == pytest.approx(one["share"], abs=1e-6)


def test_prompt_only_scores_are_those_of_the_merged_network_of_each_windows_context(world):
    evaluation = run(world, world.models["lory"], evaluation_documents=2)
    model = AutoModelForCausalLM.from_pretrained(world.models["lory"].path).eval()
    words = load_tokenizer(world.tokenizer.path)
    held = [("split", "==", "heldout"), ("domain", "==", "interface")]
    documents = sorted(
        read_table(world.documents, ["document", "text"], held).to_pylist(), key=lambda d: d["document"]
    )[:2]
    stream = lead(world, words, "el", "interface")
    owner = [None] * len(stream)
    for number, document in enumerate(documents):
        ids = words(document["text"], add_special_tokens=False)["input_ids"]
        stream += [*ids, words.eos_token_id]
        owner += [number] * len(ids) + [None]
    bits = [0.0, 0.0]
    for start in range(0, len(stream) - SEGMENT, LENGTH - SEGMENT):
        window = torch.tensor([stream[start : start + LENGTH]])
        weights = prompt_routing_weights(model, window[:, :SEGMENT])
        with torch.no_grad():
            logits = model(input_ids=window, expert_weights=weights).logits[0].double().log_softmax(-1)
        for at in range(SEGMENT, window.shape[1]):
            if owner[start + at] is not None:
                bits[owner[start + at]] -= float(logits[at - 1, stream[start + at]]) / math.log(2)
    rows_of = {row["document"]: row for row in rows(evaluation)}
    for document, expected in zip(documents, bits, strict=True):
        assert rows_of[document["document"]]["bits_by_prompt"] == pytest.approx(expected, rel=1e-6)
    row = next(row for row in rows(evaluation, "scores") if row["domain"] == "interface" and row["language"] is None)
    assert row["bits_per_byte_by_prompt"] == pytest.approx(sum(bits) / row["bytes"], rel=1e-6)


def test_models_without_segments_have_no_prompt_only_scores(evaluations):
    for name in ("dense", "stage 2"):
        assert {row["bits_by_prompt"] for row in rows(evaluations[name])} == {None}
        assert {row["bits_per_byte_by_prompt"] for row in rows(evaluations[name], "scores")} == {None}


def test_the_same_evaluation_twice_is_the_same_artifact(world, evaluations):
    assert run(world, world.models["lory"]).digest == evaluations["lory"].digest


def test_all_models_score_the_same_tokens_of_the_same_documents(evaluations):
    scored = [[(row["document"], row["tokens"], row["bytes"]) for row in rows(each)] for each in evaluations.values()]
    assert scored[0] == scored[1] == scored[2]


def test_every_token_is_scored_once(world, evaluations):
    words = load_tokenizer(world.tokenizer.path)
    texts_by_id = {
        row["document"]: row["text"] for row in read_table(world.documents, ["document", "text"]).to_pylist()
    }
    for row in rows(evaluations["dense"]):
        tokens = len(words(texts_by_id[row["document"]], add_special_tokens=False)["input_ids"])
        assert row["tokens"] == tokens
        assert row["bytes"] == len(texts_by_id[row["document"]].encode())


def test_levels_add_up(evaluations):
    scores = rows(evaluations["dense"], "scores")
    total = next(row for row in scores if row["level"] == "all")
    for level in ("language", "domain", "language+domain"):
        assert sum(row["tokens"] for row in scores if row["level"] == level) == total["tokens"]
    assert {row["language"] for row in scores if row["level"] == "language"} == {"en", "el"}
    assert {row["domain"] for row in scores if row["level"] == "domain"} == {"code", "docs", "interface"}


def test_positions_past_the_context_add_up_to_the_scores(evaluations):
    scored = [row for row in rows(evaluations["lory"], "positions") if row["scored"]]
    assert sum(row["bits"] for row in scored) == pytest.approx(sum(row["bits"] for row in rows(evaluations["lory"])))
    assert min(row["first"] for row in scored) == SEGMENT
    assert max(row["last"] for row in scored) == LENGTH - 1


def test_routing_shares_sum_to_one_in_every_layer(evaluations):
    for name, experts in (("lory", 4), ("stage 2", 4)):
        sums = {}
        for row in rows(evaluations[name], "routing"):
            place = (row["layer"], row["language"], row["domain"])
            sums.setdefault(place, []).append((row["share"], row["top_k_share"]))
        assert len(sums) == 2 * 3
        for shares in sums.values():
            assert len(shares) == experts
            assert sum(share for share, _ in shares) == pytest.approx(1, abs=1e-5)
            choices = [choice for _, choice in shares]
            assert choices == [None] * experts if name == "lory" else sum(choices) == pytest.approx(1)
    assert rows(evaluations["dense"], "routing") == []


def test_all_models_continue_the_same_prompts_and_each_says_how_it_was_routed(evaluations):
    samples = {name: json.loads(each.file("samples.json").read_text()) for name, each in evaluations.items()}
    prompts = [[(s["document"], s["prompt"], s["original"]) for s in each] for each in samples.values()]
    assert prompts[0] == prompts[1] == prompts[2]
    assert [sample["language"] for sample in samples["dense"]] == ["el", "el", "en", "en"]
    assert {sample["domain"] for sample in samples["dense"][2:]} == {"code", "docs"}
    assert samples["dense"][0]["routing"] == []
    for name in ("lory", "stage 2"):
        layers = samples[name][0]["routing"]
        assert len(layers) == 2
        assert sum(layers[0]) == pytest.approx(1, abs=0.01)


def test_sampling_with_a_temperature_is_seeded(world):
    one, two, other = (
        json.loads(
            run(world, world.models["lory"], evaluation_temperature=1.0, seed=seed).file("samples.json").read_text()
        )
        for seed in (0, 0, 1)
    )
    assert one == two
    assert [sample["written"] for sample in one] != [sample["written"] for sample in other]


def test_at_most_so_many_documents_of_each_language_and_domain(world):
    few = rows(run(world, world.models["dense"], evaluation_documents=2))
    counts = {}
    for row in few:
        counts[row["language"], row["domain"]] = counts.get((row["language"], row["domain"]), 0) + 1
    assert counts == {("en", "code"): 2, ("en", "docs"): 2, ("el", "interface"): 2}


def test_statistics_say_bits_per_byte_by_language_and_domain(evaluations):
    statistics = evaluations["lory"].statistics
    assert set(statistics["bits_per_byte"]["language"]) == {"en", "el"}
    assert set(statistics["bits_per_byte"]["domain"]) == {"code", "docs"}  # of the original languages
    assert statistics["model"] == "LoryForCausalLM"
    assert statistics["languages_without_held_out_text"] == []


def test_a_language_without_held_out_text_is_named_and_the_rest_is_scored(world):
    only_english = [row | {"split": "train"} if row["language"] == "el" else row for row in texts()]
    evaluation = run(world, world.models["dense"], documents=write_documents(world.store, only_english))
    assert evaluation.statistics["languages_without_held_out_text"] == ["el"]
    assert set(evaluation.statistics["bits_per_byte"]["language"]) == {"en"}


def test_a_stream_shorter_than_the_context_is_named_and_its_language_too(world):
    short = [row for row in texts() if row["language"] == "en"]
    short.append({"text": "Μικρό.", "language": "el", "domain": "interface", "group": "expanded", "split": "heldout"})
    evaluation = run(world, world.models["dense"], documents=write_documents(world.store, short))
    assert evaluation.statistics["too_short_to_score"] == ["el, interface"]
    assert evaluation.statistics["languages_without_held_out_text"] == ["el"]


def test_no_held_out_documents_at_all_is_an_error_that_says_so(world):
    documents = write_documents(world.store, [row | {"split": "train"} for row in texts()])
    with pytest.raises(EclectusError, match=f"{documents.name} has no held-out documents"):
        run(world, world.models["dense"], documents=documents)


def test_without_training_text_the_first_tokens_of_a_stream_are_context_and_its_bytes_are_in_proportion(world):
    rows_held = [row for row in texts() if row["split"] == "heldout"]
    documents = write_documents(world.store, rows_held)
    words, seen = load_tokenizer(world.tokenizer.path), set()
    by_id = {row["document"]: row["text"] for row in read_table(documents, ["document", "text"]).to_pylist()}
    for row in rows(run(world, world.models["dense"], documents=documents)):
        tokens = len(words(by_id[row["document"]], add_special_tokens=False)["input_ids"])
        expected = tokens if row["domain"] in seen else tokens - SEGMENT
        seen.add(row["domain"])
        assert row["tokens"] == expected
        assert row["bytes"] == pytest.approx(len(by_id[row["document"]].encode()) * expected / tokens)


def test_models_with_different_tokenizers_score_every_byte_of_the_same_documents(world, evaluations, tmp_path):
    kinds = {
        "bytes": byte_level(tmp_path / "b"),
        "sentences": llama(tmp_path / "l"),
        "words": words_only(tmp_path / "w"),
    }
    scored = {"own": rows(evaluations["dense"])}
    for name, folder in kinds.items():
        each = load_tokenizer(folder)
        shape = LlamaConfig.from_pretrained(world.models["dense"].path)
        shape.vocab_size = len(each)
        evaluation = run(world, write_model(world.store, LlamaForCausalLM(shape), each))
        scored[name] = rows(evaluation)
        assert evaluation.statistics["vocabulary"] == len(each)
        assert (evaluation.statistics["unknown_tokens"] > 0) == (name == "words")
    texts_by_name = [[(row["document"], row["bytes"]) for row in each] for each in scored.values()]
    assert texts_by_name[0] == texts_by_name[1] == texts_by_name[2] == texts_by_name[3]
    assert len({sum(row["tokens"] for row in each) for each in scored.values()}) == 4


def test_a_checkpoint_is_scored_with_its_own_tokenizer_whatever_is_given(world, evaluations):
    with world.store.draft("tokenizer") as draft:
        tokenizer.function(world.documents, TokenizerSettings(tokenizer_vocabulary=600), draft)
        larger = world.store.commit(draft)
    assert run(world, world.models["dense"], tokens=larger).digest == evaluations["dense"].digest


def test_a_checkpoint_without_tokenizer_takes_the_given_one_or_is_refused_in_one_line(world, evaluations):
    model = LlamaForCausalLM.from_pretrained(world.models["dense"].path)
    with world.store.draft("checkpoint") as draft:
        model.save_pretrained(draft.path)
        bare = world.store.commit(draft)
    assert rows(run(world, bare)) == rows(evaluations["dense"])
    message = rf"{bare.name} brings no tokenizer .*copy that of the model into its folder, or name it with --tokenizer"
    with world.store.draft("evaluation") as draft, pytest.raises(EclectusError, match=message):
        evaluate.function(world.documents, None, bare, EvaluateSettings(**SETTINGS), draft)


def test_logits_that_are_no_numbers_are_an_error_that_names_model_and_document(world):
    model = LlamaForCausalLM.from_pretrained(world.models["dense"].path)
    with torch.no_grad():
        model.model.norm.weight[:] = 3e38
    broken = write_model(world.store, model, load_tokenizer(world.tokenizer.path))
    with pytest.raises(
        EclectusError, match=rf"{broken.name} gives logits that are not finite on document [0-9a-f]{{32}}"
    ):
        run(world, broken)


def test_a_segment_longer_than_the_context_is_refused_because_it_looks_ahead(world):
    with pytest.raises(EclectusError, match=r"segment of 16 tokens.*set evaluation_context to 16"):
        run(world, world.models["lory"], evaluation_context=8)


def test_windows_longer_than_the_model_knows_are_refused(world):
    with pytest.raises(EclectusError, match=r"evaluation_tokens is 128, but .* has 64 positions"):
        run(world, world.models["dense"], evaluation_tokens=128)
    with pytest.raises(EclectusError, match="leaves nothing to score in windows of 64"):
        run(world, world.models["dense"], evaluation_context=64)


def test_a_model_that_brings_its_own_code_is_refused(world, tmp_path):
    place = tmp_path / "foreign"
    shutil.copytree(world.models["dense"].path, place)
    config = json.loads((place / "config.json").read_text())
    config |= {
        "model_type": "foreign",
        "architectures": ["Foreign"],
        "auto_map": {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Foreign"},
    }
    (place / "config.json").write_text(json.dumps(config))
    (place / "foreign.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(EclectusError, match="brings its own code"):
        run(world, Artifact("checkpoint", "f" * 64, str(place)))


def test_bits_are_finite_and_near_uniform_for_untrained_models(evaluations):
    for each in evaluations.values():
        bits = np.array([row["bits"] / row["tokens"] for row in rows(each)])
        assert np.isfinite(bits).all()
        assert bits.min() > 5


@pytest.fixture(scope="module")
def short(world):
    """Documents that are shorter than a window."""
    return write_documents(world.store, [row | {"text": row["text"][:90]} for row in texts()])


@pytest.mark.parametrize("name", ["dense", "lory", "stage 2"])
def test_with_the_document_mask_a_document_is_scored_as_if_it_stood_alone(world, short, name):
    assert "pack_document_mask" not in EvaluateSettings().key_values()
    assert EvaluateSettings(pack_document_mask=True).key_values()["pack_document_mask"] is True
    settings = {"documents": short, "evaluation_context": 16 if name == "lory" else 1}
    apart, together = (
        {row["document"]: row for row in rows(run(world, world.models[name], pack_document_mask=mask, **settings))}
        for mask in (True, False)
    )
    model = AutoModelForCausalLM.from_pretrained(world.models[name].path).eval()
    words = load_tokenizer(world.tokenizer.path)
    given = {"first_segment": "uniform"} if name == "lory" else {}
    found = {"alone": 0, "together": 0}
    for row in read_table(short, ["document", "text"], [("split", "==", "heldout")]).to_pylist():
        ids = words(row["text"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            alone = model(torch.tensor([ids]), **given).logits[0, :-1].log_softmax(-1)
        bits = -alone.gather(1, torch.tensor(ids[1:])[:, None]).sum().item() / math.log(2)
        for kind, scored in (("alone", apart), ("together", together)):
            mine = scored.get(row["document"], {"bits": 0})
            found[kind] += mine["bits"] == pytest.approx(bits, rel=1e-4) and mine["tokens"] == len(ids) - 1
    # A document that goes on in the next window is not whole in either.
    assert found["alone"] >= 6 and found["together"] == 0, found
    assert all(row["bits_by_prompt"] is None for row in apart.values())

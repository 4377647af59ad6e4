"""What is written as GGUF computes what the checkpoint computes; what llama.cpp cannot compute is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

from eclectus.models.checkpoints.dense_base import DenseBase
from eclectus.models.checkpoints.families import UnsupportedModelError
from eclectus.models.checkpoints.gguf.export import export_gguf
from eclectus.models.checkpoints.gguf.header import read_header
from eclectus.models.checkpoints.gguf.mixture_reader import gguf_reference
from eclectus.models.checkpoints.gguf.reader import read_gguf
from eclectus.models.checkpoints.proof import StepZeroError
from eclectus.models.mixture.export import export_checkpoint
from eclectus.models.mixture.upcycle import upcycle
from tests.support import tokenizers
from tests.support.checkpoint_kinds import ROPES, live_logits, trained_mixture
from tests.support.dense_bases import dense, logits, tokens, write_base


def without_tokenizer(folder):
    """Its tokenizer is of whole words, which no GGUF file can hold."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


def written(path):
    """A GGUF file's logits on `tokens()`, as llama.cpp computes them, in float64."""
    ids = tokens()
    return gguf_reference(path).logits(ids, torch.arange(ids.shape[1]).expand_as(ids)).float()


@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen3", "qwen3 without biases, tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_trained_mixture_in_gguf_computes_what_the_training_model_computes(tmp_path, name, dtype):
    if name.startswith("qwen3 without"):
        name = "qwen3"
        write_base(tmp_path / "base", name)
        config = tmp_path / "base" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
        weights = load_file(tmp_path / "base" / "model.safetensors")
        weights.pop("lm_head.weight")
        save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
        upcycle(tmp_path / "base", tmp_path / "out", experts=3)
        expected = logits(tmp_path / "base", tokens())
    else:
        model = trained_mixture(tmp_path, name)
        export_checkpoint(model, tmp_path / "out")
        expected = live_logits(model)
    made = export_gguf(without_tokenizer(tmp_path / "out"), tmp_path / "out.gguf", dtype)
    assert made.proof.max_abs_delta < 1e-6
    rounding = {torch.float32: 1e-5, torch.bfloat16: 1.0, torch.float16: 0.1}[dtype]
    assert (written(tmp_path / "out.gguf") - expected).abs().max() < rounding
    kinds = {tensor.kind.name for name, tensor in read_header(tmp_path / "out.gguf")[1].items() if "exps" in name}
    assert kinds == {{torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]}


@pytest.mark.parametrize("rope", ["theta", "linear", "yarn", "llama3"])
def test_a_dense_model_comes_back_from_its_gguf_file_with_scaled_positions_and_tokenizer(tmp_path, rope):
    folder = dense(tmp_path / "dense", rope_parameters=dict(ROPES[rope]), tie_word_embeddings=rope == "yarn")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    made = export_gguf(folder, tmp_path / "dense.gguf")
    assert made.architecture == "llama" and made.dtype is torch.float32 and not made.notes
    (tmp_path / "back").mkdir()
    DenseBase.from_gguf(tmp_path / "dense.gguf").save(tmp_path / "back")
    torch.testing.assert_close(logits(tmp_path / "back", tokens()), logits(folder, tokens()), rtol=0, atol=1e-5)
    read = read_gguf(tmp_path / "dense.gguf").tokenizer
    assert read("an html page 3.14")["input_ids"] == open_ids(folder, "an html page 3.14")
    assert read.chat_template == "{{ messages[0].content }}"


def open_ids(folder, text):
    from eclectus.models.checkpoints.tokenizer_files import open_tokenizer

    return open_tokenizer(folder)(text)["input_ids"]


def test_yarn_keeps_a_temperature_of_its_own(tmp_path):
    rope = ROPES["yarn"] | {"attention_factor": 1.7, "beta_fast": 16.0, "beta_slow": 2.0}
    export_gguf(dense(tmp_path / "dense", rope_parameters=rope, tokenizer=None), tmp_path / "dense.gguf")
    assert gguf_reference(tmp_path / "dense.gguf").rope.scale == pytest.approx(1.7)


def test_a_sliding_window_becomes_the_context_of_the_file(tmp_path):
    base = without_tokenizer(write_base(tmp_path / "base", "mistral"))
    made = export_gguf(base, tmp_path / "base.gguf")
    assert read_header(tmp_path / "base.gguf")[0]["llama.context_length"] == 16 and "16 tokens" in made.notes[0]
    inside = tokens(length=16)
    found = gguf_reference(tmp_path / "base.gguf").logits(inside, torch.arange(16).expand_as(inside)).float()
    torch.testing.assert_close(found, logits(base, inside), rtol=0, atol=1e-5)


def test_tokens_without_rows_and_rows_without_tokens_keep_every_other_id(tmp_path):
    export_gguf(dense(tmp_path / "more", vocab_size=310), tmp_path / "more.gguf")
    fields = gguf_fields(tmp_path / "more.gguf")
    assert fields["tokenizer.ggml.tokens"][300:] == ["<s>", "</s>", *(f"[PAD{number}]" for number in range(302, 310))]
    assert fields["tokenizer.ggml.token_type"][299:303] == [1, 3, 3, 5] and fields["tokenizer.ggml.pre"] == "gpt-2"


def test_a_tokenizer_of_sentence_piece_keeps_bytes_scores_and_its_first_token(tmp_path):
    rows = 1 + max(open_vocabulary(tokenizers.llama(tmp_path / "words")).values())
    export_gguf(dense(tmp_path / "dense", vocab_size=rows, tokenizer=tokenizers.llama), tmp_path / "dense.gguf")
    fields = gguf_fields(tmp_path / "dense.gguf")
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 6]
    tokens_, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    assert scores[tokens_.index("▁a")] > scores[tokens_.index("▁th")] > scores[tokens_.index("t")]


def open_vocabulary(folder):
    return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]


def gguf_fields(path):
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(str(path)).fields.items()}


def test_the_gguf_package_reads_the_same_tensors(tmp_path):
    import gguf

    folder = dense(tmp_path / "dense", tokenizer=None, tie_word_embeddings=False)
    export_gguf(folder, tmp_path / "dense.gguf")
    stored = load_file(folder / "model.safetensors")
    read = {
        each.name: torch.from_numpy(each.data.copy()) for each in gguf.GGUFReader(str(tmp_path / "dense.gguf")).tensors
    }
    assert torch.equal(read["blk.1.ffn_down.weight"], stored["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(read["output.weight"], stored["lm_head.weight"]) and len(read) == len(stored)


def changed_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: upcycled(root, "qwen2"), "is a Qwen2Moe, which llama.cpp computes otherwise"),
        (lambda root: upcycled(root, "llama", [3, 2]), "different numbers of experts in its layers"),
        (lambda root: dense(root / "x", rope_parameters=dict(ROPES["dynamic"])), "scales positions by dynamic"),
        (lambda root: dense(root / "x", Qwen3Config, head_dim=16, attention_bias=True), "qwen3 has no biases"),
        (lambda root: dense(root / "x", hidden_act="gelu"), "hidden_act 'gelu'"),
        (lambda root: dense(root / "x", tokenizer=tokenizers.unigram), "it is of kind Unigram"),
        (lambda root: dense(root / "x", tokenizer=tokenizers.word_piece), "it is of kind WordPiece"),
        (lambda root: spaced(dense(root / "x")), "puts a space before every text"),
        (lambda root: cut_by_words(dense(root / "x")), "llama.cpp has no name for how it cuts text"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_by_name(tmp_path, make, said):
    with pytest.raises(UnsupportedModelError, match=said):
        export_gguf(make(tmp_path), tmp_path / "x.gguf")


def upcycled(root, name, experts=3):
    write_base(root / "base", name)
    upcycle(root / "base", root / "moe", experts=experts)
    return root / "moe"


def spaced(folder):
    tokenizers.change(folder / "tokenizer.json", lambda it: it["pre_tokenizer"].update(add_prefix_space=True))
    return folder


def cut_by_words(folder):
    split = {"type": "Split", "pattern": {"Regex": r"\w"}, "behavior": "Isolated", "invert": False}

    def edit(it):
        it["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, it["pre_tokenizer"]]}

    tokenizers.change(folder / "tokenizer.json", edit)
    return folder


def test_a_writer_that_loses_the_order_of_rows_is_caught_by_the_proof(tmp_path, monkeypatch):
    import eclectus.models.checkpoints.gguf.export as export

    monkeypatch.setattr(export, "_interleaved", lambda value, heads: value)
    with pytest.raises(StepZeroError, match="differs from"):
        export_gguf(dense(tmp_path / "dense", tokenizer=None), tmp_path / "dense.gguf")

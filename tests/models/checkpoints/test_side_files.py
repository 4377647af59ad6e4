"""Side files pass through every stage and every export; strays, which would change what a folder opens as, do not."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from eclectus.models.checkpoints.side_files import checkpoint_files, copy_side_files, has_tokenizer, side_files
from eclectus.models.checkpoints.writing import save_model
from eclectus.models.extension.lory import extend_lory
from eclectus.models.extension.methods import open_method, open_review, save_method
from eclectus.models.mixture.export import export_checkpoint, export_dense_checkpoint, extract_base
from eclectus.models.mixture.extend_again import extend_again
from eclectus.models.mixture.upcycle import upcycle
from eclectus.models.pretraining import stages
from eclectus.models.pretraining.checkpoint import save_trained
from eclectus.models.pretraining.export_dense import export_dense
from eclectus.models.sharding.blueprint import Blueprint
from eclectus.models.training.process import Process
from eclectus.tasks.training.fetch_model import FetchSettings, fetch
from tests.support.dense_bases import logits, tokens, write_base

# Sampling settings that transformers 5 reads and refuses to save, and several tokens that end a text.
GENERATION = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": [1, 2], "max_new_tokens": 7}
SIDE = {
    "generation_config.json": json.dumps(GENERATION),
    "special_tokens_map.json": '{"eos_token": "w1"}',
    "added_tokens.json": '{"w2": 2}',
    "tokenizer.model": "pieces",
    "tokenizer.4.0.0.json": "{}",
    "vocab.json": "{}",
    "vocab.txt": "w0",
    "merges.txt": "#version: 0.2",
    "spiece.model": "pieces",
    "sentencepiece.bpe.model": "pieces",
    "qwen.tiktoken": "IQ== 0",
    "tekken.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "LICENSE.txt": "terms",
    "NOTICE": "terms",
    "USE_POLICY.md": "terms",
}
STRAY = {
    "adapter_config.json": '{"base_model_name_or_path": "elsewhere", "peft_type": "LORA"}',
    "adapter_model.safetensors": "",
    "consolidated.safetensors": "",
    "consolidated.safetensors.index.json": "{}",
    "params.json": "{}",
    "preprocessor_config.json": "{}",
    "trainer_state.json": "{}",
    "quantize_config.json": "{}",
    "requirements.txt": "",
    "pytorch_model.bin": "",
    "optimizer.pt": "",
    "modeling_own.py": "",
    "README.md": "the base's card",
    "original/params.json": "{}",
    "original/tokenizer.model": "pieces",
    "additional_chat_templates/notes.txt": "",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base_with(tmp_path_factory.mktemp("base"), SIDE | STRAY)


def write_base_with(folder: Path, files: dict[str, str]) -> Path:
    write_base(folder, "llama")
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return folder


def has_all_side_files(folder: Path, kept: dict[str, str] = SIDE) -> None:
    for name, content in kept.items():
        assert (folder / name).read_text() == content, name
    assert not [name for name in STRAY if (folder / name).exists()]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [1, 2]


def fetched(home, base: Path) -> Path:
    with home.store.draft("checkpoint") as draft:
        fetch.function(settings=FetchSettings(base_model=str(base)), out=draft)
        return Path(home.store.commit(draft).path)


def test_from_fetch_over_both_stages_to_export_extraction_and_a_second_extension(home, base, tmp_path):
    folders = [fetched(home, base)]

    def then(name, make):
        make(folders[-1], tmp_path / name)
        folders.append(tmp_path / name)

    def stage_1(start, out):
        save_method(open_method("moe_lpr", start), out, start)

    then("moe", lambda start, out: upcycle(start, out, experts=2))
    then("stage 1", stage_1)
    then("review", lambda start, out: save_method(open_review(start), out, start))
    then("more", lambda start, out: extend_again(start, out, new_experts=1, calibration=tokens(8, 4), largest_share=1))
    then("more, stage 1", stage_1)
    then("export", export_checkpoint)
    then("back", extract_base)
    then("exported", export_dense_checkpoint)
    assert len(folders) == 9
    for folder in folders:
        has_all_side_files(folder)
        assert AutoTokenizer.from_pretrained(folder)("w5 w6")["input_ids"] == [5, 6]
    assert torch.equal(logits(folders[-1], tokens()), logits(folders[0], tokens()))


@pytest.mark.parametrize("method", ["full", "lora", "llama_pro"])
def test_of_dense_methods(home, base, tmp_path, method):
    start = fetched(home, base)
    model = open_method(method, start, lora_rank=2, new_blocks=1)
    save_method(model, tmp_path / "out", start)
    has_all_side_files(tmp_path / "out")
    export_dense_checkpoint(tmp_path / "out", tmp_path / "exported")
    has_all_side_files(tmp_path / "exported")


def test_of_lory_from_a_dense_start_its_extension_and_its_dense_export(home, base, tmp_path):
    start = fetched(home, base)
    dense = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    model = stages.lory_from_dense(Blueprint.of(dense), {}, ["a"], 2, segment_length=8).blueprint.make()
    save_trained(model, start, tmp_path / "lory", None, Process())
    extend_lory(tmp_path / "lory", tmp_path / "wider")
    wider = open_method("moe_lpr", tmp_path / "wider")
    save_method(wider, tmp_path / "trained", tmp_path / "wider")
    lory = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    export_dense(lory, tmp_path / "dense", prompt="w5 w6 w7")
    for name in ("lory", "wider", "trained", "dense"):
        has_all_side_files(tmp_path / name)


def test_sampling_settings_in_config_json_do_not_end_a_training_at_its_last_step(tmp_path):
    base = write_base(tmp_path / "base", "qwen2")
    config = json.loads((base / "config.json").read_text()) | {"temperature": 0.6, "top_p": 0.9, "max_length": 4096}
    (base / "config.json").write_text(json.dumps(config))
    (base / "generation_config.json").unlink()
    model = open_method("full", base)
    save_method(model, tmp_path / "out", base)
    assert torch.equal(logits(tmp_path / "out", tokens()), logits(base, tokens()))


def test_a_generation_config_that_transformers_refuses_to_save_is_kept_without_a_folder_of_side_files(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(write_base(tmp_path / "base", "qwen3"), dtype=torch.float32)
    model.generation_config = GenerationConfig(temperature=0.6, do_sample=False, eos_token_id=[1, 2])
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.save_pretrained(tmp_path / "transformers")
    save_model(model, tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.6


def test_shards_are_those_of_the_index_whatever_their_names(tmp_path):
    base = write_base(tmp_path / "base", "llama", max_shard_size="20KB")
    index = base / "model.safetensors.index.json"
    for path in sorted(base.glob("model-*.safetensors")):
        path.rename(path.with_name(f"pytorch_{path.name}"))
    index.write_text(index.read_text().replace("model-", "pytorch_model-"))
    (base / "model-00001-of-00001.safetensors").write_text("a stray shard")
    listed = [str(path) for path in checkpoint_files(base)]
    assert "model-00001-of-00001.safetensors" not in listed and index.name in listed
    assert sum(name.startswith("pytorch_model-") for name in listed) > 1


def test_tokenizer_names_of_transformers_5_are_replaced_and_all_else_stays(tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    config = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["w2"], "model_max_length": 7, "ä": "ö"}
    (tmp_path / "from" / "tokenizer_config.json").write_text(json.dumps(config))
    copy_side_files(tmp_path / "from", tmp_path / "to")
    written = json.loads((tmp_path / "to" / "tokenizer_config.json").read_text())
    replaced = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["w2"]}
    assert written == replaced | {"model_max_length": 7, "ä": "ö"}
    assert not has_tokenizer(tmp_path / "from") and side_files(tmp_path / "from") == [Path("tokenizer_config.json")]

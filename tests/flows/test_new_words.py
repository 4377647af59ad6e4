"""A base whose tokenizer does not know a script gets words for it: the flow from documents to a stock checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import eclectus.flows.extend
from eclectus.flows.parameters import CurateParameters, ExtendParameters
from eclectus.flows.run import open_run
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import query
from tests.support.new_words import make_english
from tests.support.small_world import texts

SMALL = {
    "language_detector": "field", "original_languages": ["en"], "expanded_languages": ["el"], "embedding_steps": 2,
    "embedding_dimension": 16, "instance_tokens": 32, "heldout_minimum": 4, "extension_experts": 2,
    "post_pretrain_steps": 3, "post_pretrain_warmup_steps": 1, "post_pretrain_learning_rate": 1e-2, "review_steps": 2,
    "review_warmup_steps": 1, "training_workers": 0, "extension_vocabulary": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of the flow, and the same again."""
    folder = tmp_path_factory.mktemp("new-words")
    _, _, base, _ = make_english(folder / "made", "llama tied")
    lines = [json.dumps({"text": row["text"], "language": row["language"], "domain": row["domain"]}) for row in texts()]
    (folder / "documents.jsonl").write_text("\n".join(lines))
    home = Home.open(folder / "home")
    parameters = ExtendParameters(**SMALL, sources=[str(folder / "documents.jsonl")], base_model=base.path)
    found = SimpleNamespace(base=base, home=home, parameters=parameters)
    for name in ("first", "again"):
        with open_run("extend", parameters, home) as run:
            result = eclectus.flows.extend.extend.whole(parameters)
        states = dict(query(f"select label, state from steps where run = '{run.id}'", home)[1])
        setattr(found, name, SimpleNamespace(result=result, states=states))
    return found


def test_everything_is_packed_trained_and_written_with_the_extended_tokenizer(world):
    result = world.first.result
    made, rows = result.curated.tokenizer.statistics, world.base.file("config.json")
    before = json.loads(rows.read_text())["vocab_size"]
    assert made["new_tokens"] == 40 and made["first_new_id"] == before
    for instances in (result.curated.original, result.curated.expanded, result.curated.review):
        assert json.loads(instances.file("instances.json").read_text())["vocabulary"] == before + 40
    old = load_file(world.base.file("model.safetensors"))["model.embed_tokens.weight"]
    tables = {}
    for name, checkpoint in result.checkpoints.items():
        folder = Path(checkpoint.path)
        table = tables[name] = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(table[:before], old) and len(table) == before + 40
        model, tokens = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.config.vocab_size == before + 40 and max(tokens.get_vocab().values()) == before + 39
        mass = checkpoint.statistics["new_token_mass"]
        assert 0 < mass["before"]["mass"] < 1 and mass["after"]["bits_per_token"] > 0
    # The review trains routers only.
    assert torch.equal(tables["stage 1"], tables["stage 2"])
    assert result.checkpoints["stage 1"].statistics["frozen_sha256"] == result.upcycled.statistics["base_digest"]


def test_the_same_run_again_reuses_every_step(world):
    assert {"extend_tokenizer", "extend_vocabulary"} <= world.first.states.keys()
    assert set(world.again.states.values()) == {"reused"}


def test_costs_are_reported_by_language(world):
    found = query("select name from artifacts where kind = 'tokenizer'", world.home)[1]
    assert len(found) >= 2
    metrics = query("select name, count(*) from metrics where name like '%per_kilobyte%' group by name", world.home)[1]
    names = [f"{each}_per_kilobyte{when}" for each in ("tokens", "cache_bytes") for when in ("", "_before")]
    assert dict(metrics) == dict.fromkeys(names, 2)


def test_without_a_base_or_a_language_there_is_nothing_to_extend(world):
    given = {"extension_vocabulary": 10, "sources": world.parameters.sources}
    with pytest.raises(EclectusError, match="tokenizer is trained here"):
        CurateParameters(**given).check_together()
    with pytest.raises(EclectusError, match="expanded_languages is empty"):
        ExtendParameters(**given, base_model=world.base.path, expanded_languages=[]).check_together()

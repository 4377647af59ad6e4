"""A Lory checkpoint leaves the home as a stock LLaMA, and what cannot be exported is named."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from eclectus.flows.cli.main import main
from eclectus.models import LoryForCausalLM
from eclectus.models.pretraining.export_dense import prompt_routing_weights
from eclectus.models.pretraining.routing_profiles import write_profiles
from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.tasks.export.lory import export
from tests.support.small_world import make_world

WEIGHTS = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def home(tmp_path_factory, world):
    """A home with one Lory checkpoint that knows its domains."""
    home = Home.open(tmp_path_factory.mktemp("work") / "home")
    with home.store.draft("checkpoint") as draft:
        LoryForCausalLM.from_pretrained(world.models["lory"].path).save_pretrained(draft.path)
        AutoTokenizer.from_pretrained(world.tokenizer.path).save_pretrained(draft.path)
        write_profiles(draft.path, {"domain": {"code": WEIGHTS.tolist()}, "language": {"en": WEIGHTS.tolist()}})
        home.store.commit(draft)
    return home


@pytest.fixture
def checkpoint(home):
    (found,) = home.store.all()
    return found


@pytest.mark.parametrize("option", ["domain", "language", "prompt"])
def test_the_command_writes_what_prompt_routing_with_these_weights_computes(home, checkpoint, tmp_path, capsys, option):
    value = {"domain": "code", "language": "en", "prompt": "import bisect"}[option]
    main(["--home", str(home.root), "export", checkpoint.name, str(tmp_path / "dense"), f"--{option}", value])
    assert "a LlamaForCausalLM of" in capsys.readouterr().out
    dense, lory = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense"),
        LoryForCausalLM.from_pretrained(checkpoint.path),
    )
    assert type(dense) is LlamaForCausalLM
    words = AutoTokenizer.from_pretrained(tmp_path / "dense")
    weights = (
        prompt_routing_weights(lory, words(value, return_tensors="pt")["input_ids"]) if option == "prompt" else WEIGHTS
    )
    ids = words("def insort(a, x): return bisect", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(dense(ids).logits, lory(ids, expert_weights=weights).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_is_named_and_leaves_nothing(world, home, checkpoint, tmp_path):
    def refused(match, name=checkpoint.name, out="dense", store=home.store, **by):
        arguments = {"domain": None, "language": None, "prompt": None, **by}
        with pytest.raises(EclectusError, match=match):
            export(store, name, tmp_path / out, **arguments)

    refused("has no domain 'law'; it has code", domain="law")
    refused("needs one of domain, language, prompt")
    refused("model_type 'llama', expected 'lory'", name=world.models["dense"].path, prompt="x")
    refused("names no artifact", name="nothing-here", prompt="x")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    refused("exists already", out="full", domain="code")


def test_a_tampered_checkpoint_is_not_exported(checkpoint, tmp_path):
    store = ArtifactStore(tmp_path / "store")
    with store.draft("checkpoint") as draft:
        LoryForCausalLM.from_pretrained(checkpoint.path).save_pretrained(draft.path)
        made = store.commit(draft)
    weights = made.file("model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-50] ^= 1
    weights.write_bytes(content)
    with pytest.raises(EclectusError, match=r"is damaged: model\.safetensors changed"):
        export(store, made.name, tmp_path / "dense", None, None, "x")


def test_a_dense_export_can_be_narrower_and_can_be_one_gguf_file(home, checkpoint, tmp_path, capsys):
    words = ["--home", str(home.root), "export", checkpoint.name]
    main([*words, str(tmp_path / "wide"), "--domain", "code"])
    main([*words, str(tmp_path / "narrow"), "--domain", "code", "--dtype", "bfloat16"])
    main([*words, str(tmp_path / "file"), "--domain", "code", "--format", "gguf"])
    wide, narrow = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("wide", "narrow"))
    assert narrow.dtype is torch.bfloat16 and wide.dtype is torch.float32
    for ours, theirs in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())
    assert [path.name for path in tmp_path.glob("file/*.gguf")] == ["file-F32.gguf"]
    assert "llama-server" in (tmp_path / "file" / "README.md").read_text()

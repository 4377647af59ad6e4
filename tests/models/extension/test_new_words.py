"""New rows are means of their pieces, the only rows that train, and in files what a stock model has."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eclectus.models.checkpoints.door import open_model
from eclectus.models.evaluation.scoring import generate, next_token_bits, without_new_words
from eclectus.models.extension.methods import RECIPES, open_method, prove_method, save_method, untrained_digest
from eclectus.models.extension.new_rows import add_new_rows, new_token_mass
from eclectus.models.extension.split_vocabulary import join_vocabulary, split_vocabulary
from eclectus.models.mixture.experts import frozen_digest
from eclectus.models.mixture.export import export_checkpoint, extract_base
from eclectus.models.mixture.upcycle import upcycle
from eclectus.models.training.process import Process
from eclectus.tasks.packing.tokenizer import load_tokenizer
from tests.support.new_words import make_new_words

FAMILIES = ("llama tied", "mistral", "qwen2", "qwen3 tied")
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
GREEK, ENGLISH = "Ποια είναι η καλύτερη μέθοδος;", "What is the best method?"


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made = {}

    def make(family):
        if family not in made:
            made[family] = make_new_words(tmp_path_factory.mktemp("words"), family)
        return made[family]

    return make


def tables(folder):
    held = load_file(Path(folder) / "model.safetensors")
    return {name: held[name] for name in TABLES if name in held}


def rows_before(world):
    return json.loads(world.base.file("config.json").read_text())["vocab_size"]


@pytest.mark.parametrize("family", FAMILIES)
def test_new_rows_are_the_means_of_their_pieces_and_old_ones_stay(worlds, family):
    world = worlds(family)
    old, new = tables(world.base.path), tables(world.wider.path)
    words, before = load_tokenizer(world.base.path), rows_before(world)
    extended = load_tokenizer(world.wider.path)
    assert old.keys() == new.keys() and len(new) == (1 if "tied" in family else 2)
    for name in new:
        assert torch.equal(new[name][:before], old[name]) and len(new[name]) == before + 60
        for number in range(before, before + 60):
            token = extended.convert_ids_to_tokens(number)
            pieces = [each.id for each in words.backend_tokenizer.model.tokenize(token)]
            assert len(pieces) > 1
            torch.testing.assert_close(new[name][number], old[name][pieces].mean(0), rtol=0, atol=1e-6)
    others = load_file(world.base.file("model.safetensors")), load_file(world.wider.file("model.safetensors"))
    assert all(torch.equal(others[0][name], others[1][name]) for name in others[0] if name not in TABLES)
    config = json.loads(world.wider.file("config.json").read_text())
    assert config["vocab_size"] == before + 60 and config["vocabulary_before"] == [before]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_without_new_tokens_has_the_same_hidden_states(worlds, family):
    world = worlds(family)
    ids = torch.tensor([load_tokenizer(world.base.path)(ENGLISH).input_ids])
    assert load_tokenizer(world.wider.path)(ENGLISH).input_ids == ids[0].tolist()
    old, new = (AutoModelForCausalLM.from_pretrained(each.path) for each in (world.base, world.wider))
    with torch.no_grad():
        before, after = (model.eval()(ids, output_hidden_states=True) for model in (old, new))
    assert all(torch.equal(*pair) for pair in zip(before.hidden_states, after.hidden_states, strict=True))
    torch.testing.assert_close(after.logits[..., : before.logits.shape[-1]], before.logits, rtol=0, atol=1e-6)
    statistics = world.wider.statistics
    assert max(statistics["max_abs_delta"], statistics["new_max_abs_delta"]) <= 1e-4 * statistics["max_abs_logit"]


def test_what_new_tokens_take_is_the_probability_of_their_columns(worlds):
    world = worlds("llama tied")
    model = open_model(world.wider.path)
    tokens = torch.randint(400, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        share = model(tokens).logits.softmax(-1)[..., rows_before(world) :].sum(-1).double()
    found = new_token_mass(model, tokens, rows_before(world))
    assert found["mass"] == pytest.approx(share.mean().item(), rel=1e-5) and 0 < found["mass"] < 1
    assert found["bits_per_token"] == pytest.approx(-torch.log2(1 - share).mean().item(), rel=1e-4)


def test_closed_tokens_are_neither_scored_nor_written(worlds):
    world = worlds("mistral")
    model, first = open_model(world.wider.path), rows_before(world)
    tokens = torch.randint(400, (3, 12), generator=torch.Generator().manual_seed(0))
    tokens[2, 3] = first + 1
    with torch.no_grad():
        opened = next_token_bits(model(tokens).logits, tokens)
        closed = next_token_bits(without_new_words(model(tokens).logits, tokens, first), tokens)
        share = model(tokens).logits.double().softmax(-1)[..., first:].sum(-1)[:, :-1].numpy()
    np.testing.assert_allclose(opened[:2] - closed[:2], -np.log2(1 - share[:2]), atol=1e-5)
    # A text with new words is scored with them.
    np.testing.assert_array_equal(opened[2], closed[2])
    model.lm_head.weight.data[first:] *= 100
    prompts = [tokens[0].tolist(), tokens[2].tolist()]
    arguments = (model, prompts, 6, 0.0, [0], 0, Process.current())
    assert all(max(written) >= first for written, _ in generate(*arguments))
    (old, _), (new, _) = generate(*arguments, closed_from=first)
    assert max(old) < first <= max(new)


def test_questions_without_new_tokens_are_answered_with_the_bases_own_only(worlds):
    from lm_eval.api.instance import Instance

    from eclectus.models.evaluation.lm_eval import make_harness_model

    world = worlds("mistral")
    model, first, words = open_model(world.wider.path), rows_before(world), load_tokenizer(world.wider.path)
    model.lm_head.weight.data[first:] *= 100
    given = (model.eval(), words, 64, 2, Process.current(), None, lambda *_: None, None, [])
    opened, closed = make_harness_model(*given), make_harness_model(*given, first)
    asked = [("What is", " the best"), ("Ποια είναι", " η καλύτερη"), ("It is", " the")]
    assert [max(words(one + other)["input_ids"]) >= first for one, other in asked] == [False, True, False]
    questions = [Instance("loglikelihood", {}, each, number) for number, each in enumerate(asked)]
    before, after = (each.loglikelihood(questions, disable_tqdm=True) for each in (opened, closed))
    for (question, answer), (value, _), (was, _) in zip(asked, after, before, strict=True):
        ids, count = words(question + answer)["input_ids"], len(words(question)["input_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        # What has new words is scored with them.
        logs = logits[:, : first if max(ids) < first else None].log_softmax(-1)
        expected = sum(float(logs[at - 1, ids[at]]) for at in range(count, len(ids)))
        assert value == pytest.approx(expected, abs=1e-3) and (value > was + 1) is bool(max(ids) < first)
    writing = [Instance("generate_until", {}, ("What is", {"until": ["\n\n"], "max_gen_toks": 4}), 0)]
    (wild,), (tame,) = (each.generate_until(writing, disable_tqdm=True) for each in (opened, closed))
    assert any("Α" <= letter <= "ώ" for letter in wild) and wild != tame
    ids = words("What is")["input_ids"]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1, :first].argmax()))
    assert words.decode(ids[-4:]) == tame


def trained(model, steps=3):
    """Some steps of AdamW with weight decay on random tokens, new ones among them."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(model.config.vocab_size, (2, 16), generator=generator)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["moe_lpr", "moe_all", "full", "lora", "llama_pro"])
def test_only_new_rows_train_except_where_everything_does(worlds, tmp_path, method, family):
    world, recipe = worlds(family), RECIPES[method]
    start = Path(world.wider.path)
    if recipe.start == "upcycled":
        upcycle(world.wider.path, tmp_path / "moe", experts=3)
        start = tmp_path / "moe"
    model = open_method(method, start, lora_rank=2, new_words=True)
    prove_method(model, method, start)
    before = untrained_digest(model)
    trained(model)
    assert untrained_digest(model) == before
    save_method(model, tmp_path / "out", start)
    rows, old, new = rows_before(world), tables(world.base.path), tables(tmp_path / "out")
    assert old.keys() == new.keys()
    for name in old:
        assert torch.equal(new[name][:rows], old[name]) == (method not in ("moe_all", "full"))
        assert not torch.equal(new[name][rows:], tables(start)[name][rows:])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.randint(rows + 60, (2, 16), generator=torch.Generator().manual_seed(3))
    plain = model.get_base_model() if method == "lora" else model
    with torch.no_grad():
        torch.testing.assert_close(stock.eval()(tokens).logits, plain.eval()(tokens).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["llama tied", "qwen2"])
def test_the_split_is_undone_bit_for_bit(worlds, family):
    model = open_model(worlds(family).wider.path)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    split_vocabulary(model)
    assert {name.rpartition(".")[2] for name, each in model.named_parameters() if "embed_tokens" in name} == {
        "frozen_weight",
        "new_weight",
    }
    with pytest.raises(ValueError, match="split already"):
        split_vocabulary(model)
    join_vocabulary(model)
    again = model.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)
    tied = model.config.tie_word_embeddings
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mixture_remembers_its_base_and_gives_it_back_with_its_tokenizer(worlds, tmp_path, family):
    world = worlds(family)
    report = upcycle(world.wider.path, tmp_path / "moe", experts=3)
    assert report.base_digest == upcycle(world.base.path, tmp_path / "plain", experts=3).base_digest
    model = trained(open_method("moe_lpr", tmp_path / "moe", new_words=True))
    assert frozen_digest(model) == report.base_digest
    save_method(model, tmp_path / "trained", tmp_path / "moe")
    made = json.loads((tmp_path / "trained" / "upcycle.json").read_text())
    assert made["original_weights"] == "unchanged"
    export_checkpoint(tmp_path / "trained", tmp_path / "half", dtype=torch.bfloat16)
    extract_base(tmp_path / "trained", tmp_path / "back")
    old, back = load_file(world.base.file("model.safetensors")), load_file(tmp_path / "back" / "model.safetensors")
    assert old.keys() == back.keys() and all(torch.equal(old[name], back[name]) for name in old)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["vocab_size"] == rows_before(world) and "vocabulary_before" not in config
    first, again = load_tokenizer(world.base.path), load_tokenizer(tmp_path / "back")
    for text in (GREEK, ENGLISH, "<|endoftext|> 3.14"):
        assert first(text).input_ids == again(text).input_ids
    assert len(AutoTokenizer.from_pretrained(tmp_path / "trained")(GREEK).input_ids) < len(first(GREEK).input_ids)


def test_a_mixture_gets_new_rows_too_and_those_of_before_stay(worlds, tmp_path):
    world = worlds("mistral")
    upcycle(world.base.path, tmp_path / "moe", experts=3)
    add_new_rows(tmp_path / "moe", world.extended.path, tmp_path / "wider")
    assert tables(tmp_path / "wider").keys() == tables(world.wider.path).keys()
    for name, value in tables(tmp_path / "wider").items():
        assert torch.equal(value, tables(world.wider.path)[name])
    extract_base(tmp_path / "wider", tmp_path / "back")
    old, back = load_file(world.base.file("model.safetensors")), load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(old[name], back[name]) for name in old)


def test_a_model_without_stock_embeddings_is_refused(worlds, tmp_path):
    from tests.support.small_world import make_world

    lory = make_world(tmp_path / "world").models["lory"]
    with pytest.raises(ValueError, match="'lory' model: set extension_vocabulary to 0"):
        add_new_rows(lory.path, worlds("mistral").extended.path, tmp_path / "out")

"""Chat: ten instructions put by a model's own template, answered as transformers does, side by side in the report."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from eclectus.storage.artifact import Artifact
from eclectus.tasks.evaluation.chat import INSTRUCTIONS, read_chat
from eclectus.tasks.evaluation.evaluate import EvaluateSettings, evaluate
from eclectus.tasks.evaluation.scores import Scores
from eclectus.tasks.packing.tokenizer import load_tokenizer
from eclectus.tasks.report.contents import chat_samples, chat_summary
from eclectus.tasks.report.report import ReportSettings, report
from tests.support.small_world import SEGMENT, make_world

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
TOKENS = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.set_num_threads(1)
    return make_world(tmp_path_factory.mktemp("world"))


def with_template(world, name, template=TEMPLATE, **generation) -> Artifact:
    """A model of the world with a chat template. generation: of its generation_config.json."""
    with world.store.draft("checkpoint") as draft:
        shutil.copytree(world.models[name].path, draft.path, dirs_exist_ok=True)
        (draft.path / "manifest.json").unlink()
        (draft.path / "chat_template.jinja").write_text(template)
        if generation:
            (draft.path / "generation_config.json").write_text(json.dumps(generation))
        return world.store.commit(draft)


def scored(world, checkpoint, **settings) -> Artifact:
    given = {
        "evaluation_context": SEGMENT, "evaluation_documents": 1, "evaluation_samples": 0, "training_workers": 0,
        "evaluation_chat_tokens": TOKENS,
    }  # fmt: skip
    with world.store.draft("evaluation") as draft:
        evaluate.function(world.documents, None, checkpoint, EvaluateSettings(**given | settings), draft)
        return world.store.commit(draft)


def prompt_of(words, instruction):
    text = words.apply_chat_template(
        [{"role": "user", "content": instruction}], tokenize=False, add_generation_prompt=True
    )
    return torch.tensor([words(text, add_special_tokens=False)["input_ids"]])


@pytest.fixture(scope="module")
def chatting(world):
    return {name: with_template(world, name) for name in ("dense", "stage 2")}


@pytest.fixture(scope="module")
def evaluations(world, chatting):
    return {name: scored(world, model) for name, model in chatting.items()}


@pytest.mark.parametrize("name", ["dense", "stage 2"])
def test_answers_are_those_of_transformers_on_the_templates_prompt(chatting, evaluations, name):
    words = load_tokenizer(chatting[name].path)
    model = AutoModelForCausalLM.from_pretrained(chatting[name].path).eval()
    answers = Scores.read(name, evaluations[name]).chat
    assert [row["instruction"] for row in answers] == list(INSTRUCTIONS)
    for row in (answers[0], answers[6]):
        prompt = prompt_of(words, row["instruction"])
        given = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": words.eos_token_id}
        written = model.generate(prompt, attention_mask=torch.ones_like(prompt), **given)[0, prompt.shape[1] :]
        assert row["answer"] == words.decode(written, skip_special_tokens=True).strip()
        assert row["ended"] == (int(written[-1]) == words.eos_token_id)


def test_a_turn_ends_with_the_tokens_that_the_generation_config_names(world):
    words = load_tokenizer(world.models["dense"].path)
    model = AutoModelForCausalLM.from_pretrained(world.models["dense"].path).eval()
    words.chat_template = TEMPLATE
    with torch.no_grad():
        first = int(model(prompt_of(words, INSTRUCTIONS[0])).logits[0, -1].argmax())
    ending = with_template(world, "dense", eos_token_id=[words.eos_token_id, first])
    row = Scores.read("ending", scored(world, ending)).chat[0]
    assert row["ended"] and row["answer"] == words.decode([first], skip_special_tokens=True).strip()


def test_without_template_or_with_zero_tokens_nothing_is_asked(world, chatting):
    for checkpoint, settings in ((world.models["dense"], {}), (chatting["dense"], {"evaluation_chat_tokens": 0})):
        evaluation = scored(world, checkpoint, **settings)
        assert Scores.read("x", evaluation).chat == [] and evaluation.statistics["chat"] is False
        assert "chat_problem" not in evaluation.statistics


def test_a_template_that_fails_or_does_not_fit_is_a_reason_and_the_scores_are_there(world):
    failing = with_template(world, "dense", "{{ raise_exception('only with tools') }}")
    evaluation = scored(world, failing)
    assert evaluation.statistics["chat_problem"] == "its chat template cannot be used: only with tools"
    assert evaluation.statistics["tokens"] > 0
    long = scored(world, with_template(world, "dense", "{{ 'word ' * 80 }}"))
    assert "do not fit its 64 positions" in long.statistics["chat_problem"]


def test_a_template_with_the_date_of_today_gives_the_same_prompt_every_day(world):
    words = load_tokenizer(world.models["dense"].path)
    words.chat_template = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    chat = read_chat(world.models["dense"], words, TOKENS, 64)
    assert {words.decode(prompt) for prompt in chat.prompts} == {"01 Jan 2025"}


def test_the_report_shows_the_answers_of_all_models_side_by_side(world, chatting, evaluations):
    plain = scored(world, world.models["lory"])
    shown = {"dense": evaluations["dense"], "stage 2": evaluations["stage 2"], "lory": plain}
    checkpoints = {**chatting, "lory": world.models["lory"]}
    with world.store.draft("report") as draft:
        report.function(shown, checkpoints, world.documents, ReportSettings(), draft)
        page, twin = (draft.file(name).read_text("utf-8") for name in ("report.html", "report.md"))
    scores = {name: Scores.read(name, each) for name, each in shown.items()}
    for sample in chat_samples(scores):
        assert [each.name for each in sample.texts] == ["dense", "stage 2"]
        assert sample.prompt in page
    assert '<h2 id="chat">Chat</h2>' in page and "## Chat" in twin
    summary = chat_summary(scores)
    assert "dense ends" in summary and "are word for word those of dense" in summary
    assert summary.endswith("No chat template that could be used: lory.")


def test_a_model_that_answers_as_before_shares_all_of_its_words(world, evaluations):
    scores = {name: Scores.read(name, evaluations["dense"]) for name in ("before", "after")}
    assert "10 are word for word those of before, with which its answers share 100% of their words" in chat_summary(
        scores
    )

"""An instruct base keeps its chat template in every export."""

import pytest
from transformers import AutoTokenizer

from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.mixture.upcycle import upcycle
from eclectus.storage.home import Home
from eclectus.tasks.export.lory import export as export_lory
from eclectus.tasks.export.mixture import export_dense, export_mixture
from tests.support.dense_bases import write_base
from tests.support.tokenizers import change

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
TURN = [{"role": "user", "content": "w3 w4"}]


@pytest.fixture(scope="module", params=["file", "config"])
def base(request, tmp_path_factory):
    """An instruct base, its template in a file of its own or in tokenizer_config.json, as older ones have it."""
    folder = write_base(tmp_path_factory.mktemp(request.param) / "base", "llama")
    if request.param == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    else:
        change(folder / "tokenizer_config.json", lambda config: config.update(chat_template=TEMPLATE))
    return folder


def rendered(folder):
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(TURN, tokenize=False)


def test_the_template_is_in_every_export(base, tmp_path):
    home = Home.open(tmp_path / "home")
    upcycle(base, tmp_path / "moe", experts=2)
    export_mixture(home, str(tmp_path / "moe"), tmp_path / "mixture", dtype="bfloat16")
    export_mixture(home, str(tmp_path / "moe"), tmp_path / "back", extract_base=True)
    export_dense(home, str(base), tmp_path / "dense")
    for name in ("moe", "mixture", "back", "dense"):
        assert rendered(tmp_path / name) == "[user] w3 w4"


def test_the_template_is_in_the_dense_export_of_a_lory_model(base, tmp_path):
    from eclectus.models.checkpoints.door import open_model
    from eclectus.models.checkpoints.writing import save_model

    lory = LoryForCausalLM.from_dense(open_model(base), num_experts=2, segment_length=8)
    (tmp_path / "lory").mkdir()
    save_model(lory, tmp_path / "lory", base)
    export_lory(Home.open(tmp_path / "home").store, str(tmp_path / "lory"), tmp_path / "out", None, None, "w3 w4 w5")
    assert rendered(tmp_path / "out") == "[user] w3 w4"

"""The choice of attention: the same training whatever computes it, and one line where it cannot compute."""

import json

import pytest
import torch

from eclectus.models.attention.choice import choose_attention
from eclectus.models.losses.objectives import next_token
from eclectus.models.training.instances import Instances
from eclectus.models.training.loop import train
from eclectus.models.training.process import Process
from tests.support.tiny_training import plan, tiny_dense, write_instances


def test_a_training_is_the_same_with_either_attention_and_its_checkpoint_does_not_say_which(tmp_path):
    data, ended = Instances(write_instances(tmp_path / "data")), {}
    for name in ("auto", "sdpa", "eager"):
        for mask in (False, True):
            model, chosen = tiny_dense(), plan(stop=3, attention=name, document_mask=mask)
            train(model, data, next_token(), chosen, Process(), tmp_path / "work", lambda *_, **__: None)
            model.save_pretrained(tmp_path / name)
            ended[name, mask] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert torch.equal(ended["auto", True], ended["sdpa", True]), "blocks have no masks but the causal one"
    assert not torch.equal(ended["auto", False], ended["sdpa", False]), "another kernel computed it"
    for mask in (False, True):
        assert not torch.equal(ended["sdpa", mask], ended["eager", mask])
        for name in ("auto", "sdpa"):
            torch.testing.assert_close(ended[name, mask], ended["eager", mask], rtol=0, atol=1e-4)
    one, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("auto", "eager"))
    assert one == other


@pytest.mark.parametrize("name", ["flex", "flash"])
def test_attention_that_computes_on_gpus_only_is_refused_on_a_cpu(name):
    with pytest.raises(ValueError, match=f"training_attention {name} computes on CUDA only, and this is cpu; choose"):
        choose_attention(tiny_dense(), name, torch.device("cpu"))


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ValueError, match=r"training_attention flash cannot be used here: .*; choose sdpa"):
        choose_attention(tiny_dense(), "flash", torch.device("cuda"))

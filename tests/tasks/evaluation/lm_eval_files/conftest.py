"""A home with models, tasks in YAML files, and what the command `lm_eval` writes of the dense model."""

import pytest
import torch

from eclectus.storage.home import Home
from tests.support.lm_eval_runs import run_lm_eval, write_tasks
from tests.support.small_world import make_world


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home.open(tmp_path_factory.mktemp("lm-eval") / "home")


@pytest.fixture(scope="module")
def world(home):
    return make_world(home.store.root)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def theirs(world, tasks, tmp_path_factory):
    return run_lm_eval(world.models["dense"].path, tasks, tmp_path_factory.mktemp("theirs"))

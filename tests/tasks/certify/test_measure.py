"""A server's failure is told from that of its environment, which is made again."""

from dataclasses import replace
from functools import partial

import pytest

from eclectus.tasks.certify import measure
from eclectus.tasks.certify.environments import UnavailableError, ensure_environment
from eclectus.tasks.certify.servers import Server

# Its client imports torch, which an environment without packages lacks.
SERVER = Server("little", ("little==1",), "json", "transformers_client", link_torch=False)


@pytest.fixture(autouse=True)
def asked_with_it(monkeypatch, installer):
    monkeypatch.setattr(measure, "ensure_environment", partial(ensure_environment, install=installer))


def test_an_environment_that_cannot_import_its_server_is_made_again_once(tmp_path, installer):
    with pytest.raises(
        UnavailableError, match="its environment is broken: ModuleNotFoundError: No module named 'torch'"
    ):
        measure.ask(replace(SERVER, module="torch"), tmp_path, {}, print)
    assert installer.made == 2


def test_an_export_whose_code_imports_what_the_server_lacks_is_refused_by_a_whole_environment(tmp_path, installer):
    with pytest.raises(UnavailableError, match="refuses the model: ModuleNotFoundError: No module named 'torch'"):
        measure.ask(SERVER, tmp_path, {}, print)
    assert installer.made == 1

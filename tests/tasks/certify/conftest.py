"""Servers without environments, asked in this process, and environments without packages."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from eclectus.tasks.certify import examination, measure
from eclectus.tasks.certify.environments import UnavailableError


@pytest.fixture
def servers_here(monkeypatch, tmp_path):
    """transformers-4.57 and -5 are this environment's; vLLM is not installed; llama.cpp refuses its file."""
    monkeypatch.setenv("ECLECTUS_SERVERS", str(tmp_path / "servers"))

    def answer(server, folder, request, report):
        assert Path(request["model"]).is_absolute()  # servers run in another folder
        if server.name == "vllm":
            raise UnavailableError("cannot be installed: no network")
        if server.gguf:
            assert request["model"].endswith(".gguf")
            raise UnavailableError("refuses the model: wrong number of tensors")
        client = importlib.import_module(f"eclectus.tasks.certify.clients.{server.client}")
        asked, answered = tmp_path / "request.json", tmp_path / "answer.json"
        asked.write_text(json.dumps(request))
        client.main(str(asked), str(answered))
        return json.loads(answered.read_text()), 0.5

    monkeypatch.setattr(measure, "ask", answer)
    monkeypatch.setattr(examination, "ask", answer)


class Installer:
    """Makes what pip would make, and counts."""

    def __init__(self):
        self.made = 0

    def __call__(self, server, place):
        self.made += 1
        (place / "bin").mkdir(parents=True)
        (place / "lib" / "python3" / "site-packages").mkdir(parents=True)
        (place / "bin" / "python").symlink_to(sys.executable)


@pytest.fixture
def installer():
    return Installer()

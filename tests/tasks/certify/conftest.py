"""Servers without environments: the transformers of this environment, asked in this process."""

import importlib
import json

import pytest

from eclectus.tasks.certify import certify, measure
from eclectus.tasks.certify.environments import UnavailableError


@pytest.fixture
def servers_here(monkeypatch, tmp_path):
    """transformers-4.57 and -5 are this environment's; vLLM is not installed; llama.cpp refuses its file."""
    monkeypatch.setenv("ECLECTUS_SERVERS", str(tmp_path / "servers"))

    def answer(server, folder, request, report):
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
    monkeypatch.setattr(certify, "ask", answer)

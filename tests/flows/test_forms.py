"""The forms of the Prefect UI: the schema that Prefect makes of a flow, and `more_settings`."""

from __future__ import annotations

import base64
import importlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, is_valid_schema, validate

from eclectus.flows.parameters import PARAMETERS, CurateParameters, MainParameters
from eclectus.flows.services.server import auth_string, join, leave, prefect_folder, server_environment
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import query

ROOT = Path(__file__).parents[2]


def form_of(flow):
    """(the schema that Prefect registers with a deployment, the part that the form is drawn from)."""
    function = getattr(importlib.import_module(f"eclectus.flows.{flow}"), flow)
    schema = parameter_schema(function).model_dump_for_openapi()
    (model,) = (schema["definitions"][PARAMETERS[flow].__name__],)
    return schema, model


@pytest.mark.parametrize("flow", PARAMETERS)
def test_the_form_has_the_basic_settings_in_the_order_of_help_and_one_field_for_the_rest(flow):
    model = PARAMETERS[flow]
    schema, form = form_of(flow)
    is_valid_schema(schema)
    names = [name for group in model.grouped().values() for name in group if model.is_basic(name)]
    shown = sorted(form["properties"], key=lambda name: form["properties"][name]["position"])
    assert shown == [*names, "more_settings"]
    for name in names:
        assert form["properties"][name]["description"] == model.model_fields[name].description
    assert form["properties"]["more_settings"]["type"] == "string"


@pytest.mark.parametrize("flow", PARAMETERS)
def test_the_server_accepts_every_setting_by_name_and_refuses_what_is_none(flow):
    schema, _ = form_of(flow)
    by_name = PARAMETERS[flow]().model_dump(mode="json")
    validate({"parameters": by_name}, schema, raise_on_error=True)
    validate({"parameters": {"sources": ["data/corpus"]}}, schema, raise_on_error=True)
    validate({"parameters": {"more_settings": "heldout_minimum: 3"}}, schema, raise_on_error=True)
    for wrong in ({"heldout_minimums": 3}, {"heldout_minimum": "many"}, {"more_settings": 3}):
        with pytest.raises(ValidationError):
            validate({"parameters": wrong}, schema, raise_on_error=True)


def test_more_settings_are_settings_like_those_given_by_name():
    written = "neighbors_k: 7\n# a comment\nduplicate_drop: false\ntext_suffixes: [.txt]\n"
    parameters = MainParameters.model_validate({"sources": ["a.jsonl"], "more_settings": written})
    by_name = MainParameters(sources=["a.jsonl"], neighbors_k=7, duplicate_drop=False, text_suffixes=[".txt"])
    assert parameters == by_name
    assert "more_settings" not in parameters.model_dump()
    assert CurateParameters.of(parameters) == CurateParameters.of(by_name)
    assert MainParameters.model_validate({"more_settings": ""}) == MainParameters()
    # What the form of a deployment without parameters submits: every default.
    submitted = MainParameters().model_dump(mode="json") | {"sources": ["a.jsonl"], "more_settings": written}
    assert MainParameters.model_validate(submitted) == by_name


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"more_settings": "neighbours_k: 3"}, "unknown setting 'neighbours_k' in more_settings; .* 'neighbors_k'"),
        ({"more_settings": "neighbors_k: many"}, "setting 'neighbors_k' in more_settings is 'many': "),
        ({"more_settings": "neighbors_k"}, "more_settings holds a str; expected 'setting: value' lines"),
        ({"more_settings": "a: b: c"}, "more_settings is not YAML"),
        ({"more_settings": "review_steps: 9", "review_steps": 5}, "'review_steps' is given twice: 5 .* 9 in more"),
        ({"more_settings": "neighbors_k: 9", "neighbors_k": 9}, "setting 'neighbors_k' is given twice"),
        ({"more_settings": "more_settings: 3"}, "unknown setting 'more_settings' in more_settings"),
    ],
)  # fmt: skip
def test_a_wrong_line_in_more_settings_is_named_with_what_is_expected(values, complaint):
    with pytest.raises(EclectusError, match=complaint):
        MainParameters.model_validate(values)


@pytest.mark.slow
def test_a_deployed_run_takes_more_settings_and_settings_by_name_and_journals_what_they_give(tmp_path):
    """A real server, `eclectus deploy`, and a run of a deployment as a worker would execute it: about a minute."""
    home = Home.open(tmp_path / "home")
    source = tmp_path / "documents.jsonl"
    texts = [f"Document {number} of the harbour, the {number}th ship and its cargo of grain." for number in range(60)]
    source.write_text("\n".join(json.dumps({"text": text, "language": "en"}) for text in texts))
    folder = prefect_folder(home)
    address = join(folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= server_environment(folder, address) | {
        "ECLECTUS_HOME": str(home.root),
        "ECLECTUS_DIRECTORY": str(ROOT),
    }

    password = base64.b64encode(auth_string(folder).encode()).decode()

    def start(*words):
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"

    def ask(path, body=None):
        request = urllib.request.Request(
            f"{address}/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json", "authorization": f"Basic {password}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    try:
        start("eclectus", "deploy")
        deployment = ask("deployments/name/curate/curate")["id"]
        small = {"sources": [str(source)], "expanded_languages": [], "tokenizer_vocabulary": 300, "instance_tokens": 32}
        for wrong in ({"neighbours_k": 3}, {"neighbors_k": "many"}):
            with pytest.raises(urllib.error.HTTPError, match="409"):
                ask(f"deployments/{deployment}/create_flow_run", {"parameters": {"parameters": small | wrong}})
        more = {"language_detector": "field", "more_settings": "embedding_steps: 2\nembedding_dimension: 16\n"}
        created = ask(f"deployments/{deployment}/create_flow_run", {"parameters": {"parameters": small | more}})
        start("prefect", "flow-run", "execute", created["id"])
        assert ask(f"flow_runs/{created['id']}")["state_type"] == "COMPLETED"
    finally:
        leave(folder)
    (parameters,) = query("select parameters from runs where state = 'completed'", home)[1][0]
    resolved = json.loads(parameters) if isinstance(parameters, str) else parameters
    assert (resolved["language_detector"], resolved["embedding_steps"], resolved["embedding_dimension"]) == (
        "field",
        2,
        16,
    )
    assert "more_settings" not in resolved

"""The forms of the Prefect UI: the schema that Prefect makes of a flow, and `more_settings`."""

from __future__ import annotations

import importlib

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, is_valid_schema, validate

from eclectus.flows.parameters import PARAMETERS, CurateParameters, MainParameters
from eclectus.storage.errors import EclectusError


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


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"more_settings": "neighbours_k: 3"}, "unknown setting 'neighbours_k' in more_settings; did you mean 'neighbors_k'?"),
        ({"more_settings": "neighbors_k: many"}, "setting 'neighbors_k' in more_settings is 'many': "),
        ({"more_settings": "neighbors_k"}, "more_settings holds a str; expected 'setting: value' lines"),
        ({"more_settings": "a: b: c"}, "more_settings is not YAML"),
        ({"more_settings": "review_steps: 9", "review_steps": 5}, "setting 'review_steps' is given twice: 5 .* 9 in more_settings"),
        ({"more_settings": "neighbors_k: 9", "neighbors_k": 9}, "setting 'neighbors_k' is given twice"),
        ({"more_settings": "more_settings: 3"}, "unknown setting 'more_settings' in more_settings"),
    ],
)  # fmt: skip
def test_a_wrong_line_in_more_settings_is_named_with_what_is_expected(values, complaint):
    with pytest.raises(EclectusError, match=complaint):
        MainParameters.model_validate(values)

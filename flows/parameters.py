"""The parameters of every flow: flat models, put together from the settings of the steps that the flow runs.

A field's description is its help text in the Prefect form, in `--help` and in the docs. No Prefect is imported here, so
that the command line can read them quickly.
"""

from __future__ import annotations

from pydantic import Field

from storage.errors import EclectusError
from tasks.budget import BudgetSettings
from tasks.data_report import DataReportSettings
from tasks.embed import EmbedSettings
from tasks.evaluate import EvaluateSettings
from tasks.extend import ExtendSettings
from tasks.group import GroupSettings
from tasks.ingest import IngestSettings
from tasks.languages import LanguageSettings
from tasks.neighbors import NeighborSettings
from tasks.pack import PackSettings
from tasks.pretrain import PretrainSettings
from tasks.replay import ReplaySettings
from tasks.report import ReportSettings
from tasks.split import SplitSettings
from tasks.static_embedding import StaticEmbeddingSettings
from tasks.tokenizer import TokenizerSettings


class CurateParameters(
    IngestSettings,
    LanguageSettings,
    SplitSettings,
    StaticEmbeddingSettings,
    EmbedSettings,
    NeighborSettings,
    GroupSettings,
    TokenizerSettings,
    BudgetSettings,
    ReplaySettings,
    PackSettings,
    DataReportSettings,
):
    """From sources to training instances."""


class PretrainParameters(CurateParameters, PretrainSettings):
    """From sources to a Lory model and its dense twin."""


class ExtendParameters(PretrainParameters, ExtendSettings):
    """From a dense checkpoint to one that knows new languages too."""

    base_model: str = Field(
        "",
        description="Dense model to extend: a folder, a .gguf file or a name on the hub. Empty: pre-train one (the dense twin).",
    )


class EvaluateParameters(ExtendParameters, EvaluateSettings, ReportSettings):
    """Evaluation and report of the models of pre-training and extension."""

    evaluate_checkpoints: list[str] = Field(
        [],
        description="Checkpoints to evaluate, as artifact names or folders. Empty: all that the other settings make.",
    )


class MainParameters(EvaluateParameters):
    """The whole job: curate, pre-train, extend, evaluate, report."""


PARAMETERS = {
    "main": MainParameters,
    "curate": CurateParameters,
    "pretrain": PretrainParameters,
    "extend": ExtendParameters,
    "evaluate": EvaluateParameters,
}


def check(parameters: CurateParameters) -> None:
    """What can be known to fail before any work starts. Raises EclectusError naming the setting."""
    from tasks.ingest import check_sources

    check_sources(parameters)
    if type(parameters) is ExtendParameters and not parameters.expanded_languages:
        raise EclectusError("expanded_languages is empty, so there is nothing to extend to; name at least one language")
    if isinstance(parameters, PretrainParameters):
        parameters.check_shape()
    if isinstance(parameters, ExtendParameters) and parameters.extension_top_k > parameters.extension_experts:
        raise EclectusError(
            f"extension_top_k {parameters.extension_top_k} is more than extension_experts {parameters.extension_experts}; lower it"
        )

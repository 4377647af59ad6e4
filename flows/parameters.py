"""The parameters of every flow: flat models, put together from the settings of the steps that the flow runs.

A field's description is its help text in the Prefect form, in `--help` and in the docs. No Prefect is imported here, so
that the command line can read them quickly.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import check_roots
from eclectus.tasks.documents.ingest import IngestSettings
from eclectus.tasks.documents.languages import LanguageSettings
from eclectus.tasks.documents.split import SplitSettings
from eclectus.tasks.evaluation.benchmark import BenchmarkSettings
from eclectus.tasks.evaluation.contamination import ContaminationSettings
from eclectus.tasks.evaluation.evaluate import EvaluateSettings
from eclectus.tasks.grouping.embed import EmbedSettings
from eclectus.tasks.grouping.group import GroupSettings
from eclectus.tasks.grouping.nearest import NeighborSettings
from eclectus.tasks.grouping.static_embedding import StaticEmbeddingSettings
from eclectus.tasks.packing.budget import BudgetSettings
from eclectus.tasks.packing.pack import PackSettings
from eclectus.tasks.packing.replay import ReplaySettings
from eclectus.tasks.packing.tokenizer import TokenizerSettings
from eclectus.tasks.promotion.new_documents import NewsSettings, RefreshSettings
from eclectus.tasks.report import ReportSettings
from eclectus.tasks.report.data_report import DataReportSettings
from eclectus.tasks.settings import BASIC, Settings
from eclectus.tasks.training.add_experts import AddExpertsSettings
from eclectus.tasks.training.extend import ExtendSettings, MethodSettings
from eclectus.tasks.training.fetch_model import FetchSettings
from eclectus.tasks.training.layer_similarity import LayerSimilaritySettings
from eclectus.tasks.training.pretrain import PretrainSettings

if TYPE_CHECKING:
    from eclectus.tasks.promotion.gate import Gate


# What every run has to be told.
FIRST = ("sources", "base_model", "original_languages", "expanded_languages")


class FlowParameters(Settings):
    """Parameters of a flow, in the order in which people meet them in the form and in `--help`.

    What every run has to be told comes first, then `leading`, then what is the flow's own before what it builds on.
    """

    leading: ClassVar[tuple[type[Settings], ...]] = ()

    def check_together(self) -> None:
        # First: what is said of a source tells what is there.
        check_roots(self)
        super().check_together()

    @classmethod
    def in_order(cls) -> list[str]:
        """Names of all fields."""
        classes = [part for lead in cls.leading for part in lead.__mro__] + list(cls.__mro__)
        own = [name for each in classes for name in inspect.get_annotations(each)]
        return [name for name in dict.fromkeys([*FIRST, *own]) if name in cls.model_fields]

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Prefect's form sorts by `position`."""
        schema = handler(core)
        fields = handler.resolve_ref_schema(schema)["properties"]
        for position, name in enumerate(cls.in_order()):
            fields[name] = {**fields.pop(name), "position": position}
        return schema


class CurateParameters(
    FlowParameters,
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


class PretrainParameters(PretrainSettings, CurateParameters):
    """From sources to a Lory model and its dense twin."""


class ExtendParameters(ExtendSettings, AddExpertsSettings, PretrainParameters):
    """From a dense checkpoint to one that knows new languages too."""

    leading = (MethodSettings, ExtendSettings)
    # Whether a run without expanded languages is an error; evaluation takes the same settings and can do without.
    must_extend: ClassVar[bool] = True

    base_model: str = Field(
        "",
        description="Model to extend: a folder, a .gguf file or a name on the hub. A dense one (Llama, Mistral, Qwen2, Qwen3), one that "
        "was extended before, or a Lory model. Empty: pre-train one.",
        json_schema_extra=BASIC,
    )
    extension_base: Literal["dense", "lory"] = Field(
        "dense", description="Which of the pre-trained models is extended where base_model is empty."
    )

    def check_together(self) -> None:
        super().check_together()
        if self.must_extend and not self.expanded_languages:
            raise EclectusError(
                "expanded_languages is empty, so there is nothing to extend to; name at least one language"
            )
        stages = ("moe_lpr", "no_review", "no_lpr")
        if self.extension_base == "lory" and not self.base_model and self.extension_method not in stages:
            raise EclectusError(
                f"extension_method {self.extension_method} extends dense models, and extension_base is lory; choose "
                f"{', '.join(stages)}, or extension_base dense"
            )


class SimilarityParameters(
    FlowParameters, LayerSimilaritySettings, FetchSettings, IngestSettings, LanguageSettings, SplitSettings
):
    """From sources and a dense checkpoint to experts for each layer."""

    def check_together(self) -> None:
        super().check_together()
        for name, value in (("base_model", self.base_model), ("expanded_languages", self.expanded_languages)):
            if not value:
                raise EclectusError(
                    f"{name} is empty; similarity is that of a model's layers between known and new languages"
                )


class JudgeParameters(EvaluateSettings, BenchmarkSettings, ContaminationSettings, ReportSettings, ExtendParameters):
    """What evaluation, gate and report take, whatever they judge."""

    leading = ()


class EvaluateParameters(JudgeParameters):
    """Evaluation and report of the models of pre-training and extension."""

    must_extend = False

    evaluate_checkpoints: list[str] = Field(
        [],
        description="Checkpoints to evaluate, as artifact names or folders. Empty: all that the other settings make.",
        json_schema_extra=BASIC,
    )
    gate: str = Field(
        "",
        description="YAML file with the rules that decide who is promoted, as configs/gate.yaml. Empty: nobody is.",
        json_schema_extra=BASIC,
    )

    def check_together(self) -> None:
        super().check_together()
        if self.gate:
            from eclectus.tasks.promotion.gate import read_gates

            read_gates(self.gate)


class MainParameters(EvaluateParameters):
    """The whole job: curate, pre-train, extend, evaluate, report."""

    leading = (PretrainSettings, ExtendSettings)


class RetrainParameters(NewsSettings, RefreshSettings, JudgeParameters):
    """The nightly retraining: looks at its sources, trains on from the champion, promotes what passes the gate."""

    retrain_line: str = Field(
        "extended",
        description="Line of champions, of those in the gate's file, that is trained on.",
        json_schema_extra=BASIC,
    )
    gate: str = Field(
        "configs/gate.yaml",
        description="YAML file with the rules that decide who is promoted.",
        json_schema_extra=BASIC,
    )

    def check_together(self) -> None:
        super().check_together()
        gate_of(self)


class FileParameters(MainParameters, RetrainParameters):
    """Every setting that a file may hold: one file serves all flows."""


PARAMETERS = {
    "main": MainParameters,
    "curate": CurateParameters,
    "pretrain": PretrainParameters,
    "extend": ExtendParameters,
    "similarity": SimilarityParameters,
    "evaluate": EvaluateParameters,
    "retrain": RetrainParameters,
}


def gate_of(parameters: RetrainParameters) -> Gate:
    """The rules of the line that is retrained. Raises EclectusError when retraining makes no model for it."""
    from eclectus.tasks.promotion.gate import read_gates
    from eclectus.tasks.training.extend import recipe_of

    lines, line = read_gates(parameters.gate), parameters.retrain_line
    if line not in lines:
        raise EclectusError(f"retrain_line '{line}' is not in {parameters.gate}; its lines are {', '.join(lines)}")
    recipe = recipe_of(parameters.extension_method)
    made = ["stage 1", "stage 2"] if recipe.reviewed else [recipe.title]
    if lines[line].model not in made:
        raise EclectusError(
            f"line '{line}' of {parameters.gate} judges '{lines[line].model}', and retraining by extension_method "
            f"{parameters.extension_method} makes {' and '.join(made)}; choose another retrain_line or method"
        )
    return lines[line]

"""The parameters of every flow: flat models, put together from the settings of the steps that the flow runs.

A field's description is its help text in the Prefect form, in `--help` and in the docs. No Prefect is imported here, so
that the command line can read them quickly.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import check_roots
from eclectus.tasks.documents.conversations import ConversationSettings
from eclectus.tasks.documents.ingest import IngestSettings
from eclectus.tasks.documents.languages import LanguageSettings
from eclectus.tasks.documents.split import DuplicateSettings, SplitSettings
from eclectus.tasks.evaluation.benchmark import BenchmarkSettings
from eclectus.tasks.evaluation.contamination import ContaminationSettings
from eclectus.tasks.evaluation.evaluate import EvaluateSettings, VocabularySettings
from eclectus.tasks.evaluation.scores import IntervalSettings
from eclectus.tasks.grouping.embed import EmbedSettings
from eclectus.tasks.grouping.group import GroupSettings
from eclectus.tasks.grouping.nearest import NeighborSettings
from eclectus.tasks.grouping.static_embedding import EmbeddingText, StaticEmbeddingSettings
from eclectus.tasks.packing.budget import BudgetSettings, amounts
from eclectus.tasks.packing.conversation_tokens import ConversationPackSettings
from eclectus.tasks.packing.new_vocabulary import NewVocabularySettings
from eclectus.tasks.packing.pack import PackSettings
from eclectus.tasks.packing.replay import ReplaySettings
from eclectus.tasks.packing.tokenizer import TRAINED_HERE, BeginSettings, TokenizerSettings
from eclectus.tasks.promotion.new_documents import NewDocumentsSettings, RefreshSettings
from eclectus.tasks.report.data_report import DataReportSettings
from eclectus.tasks.report.report import ReportSettings
from eclectus.tasks.settings import BASIC, CurationWorkerSettings, Settings, parse_settings
from eclectus.tasks.tracking import TrackerSettings
from eclectus.tasks.training.add_experts import AddExpertsSettings
from eclectus.tasks.training.extend_settings import ExtendSettings, MethodSettings, PostPretrainSettings, ReviewSettings
from eclectus.tasks.training.fetch_model import FetchSettings
from eclectus.tasks.training.layer_similarity import LayerSimilaritySettings
from eclectus.tasks.training.pretrain_settings import (
    ArchitectureSettings,
    LorySettings,
    PretrainSettings,
    check_segment,
)
from eclectus.tasks.training.run_training import DocumentMaskSettings, TrainingSettings, WorkerSettings
from eclectus.tasks.training.upcycle import UpcycleSettings

if TYPE_CHECKING:
    from eclectus.tasks.promotion.gate import Gate

# What every run needs.
FIRST = ("sources", "base_model", "original_languages", "expanded_languages")
MORE = "more_settings"
MORE_FIELD = {
    "title": "More Settings",
    "description": "Any other settings, one 'setting: value' per line, as in a config file; "
    "eclectus COMMAND --help-all describes them.",
    "type": "string",
    "default": "",
}


class FlowParameters(TrackerSettings):
    """Parameters of a flow: every setting of its steps, by name.

    Settings are shown in the groups of `GROUPS`, those that every run needs first, then the groups named by `leading`.
    The form of the Prefect UI has a field for each basic setting and one text field, `more_settings`, for the rest.
    """

    leading: ClassVar[tuple[str, ...]] = ()

    def check_together(self) -> None:
        # First, since messages about a source reveal which files exist.
        check_roots(self)
        super().check_together()

    @classmethod
    def grouped(cls) -> dict[str, list[str]]:
        """Names of all settings by group, both in the order in which help and forms show them."""
        group_of: dict[str, str] = {}
        for group, parts in GROUPS.items():
            for part in parts:
                names = inspect.get_annotations(part) if issubclass(cls, part) else ()
                group_of.update((name, group) for name in names if name in cls.model_fields)
        group_of.update((name, "input") for name in FIRST if name in cls.model_fields)
        group_of["seed"] = "all steps"
        found: dict[str, list[str]] = {group: [] for group in ("input", *cls.leading, *GROUPS, "all steps", "other")}
        for name in dict.fromkeys((*FIRST, *group_of, *cls.model_fields)):
            if name in cls.model_fields:
                found[group_of.get(name, "other")].append(name)
        return {group: names for group, names in found.items() if names}

    @classmethod
    def of_form(cls, values: dict[str, Any], origin: str) -> Self:
        """Like `read`, of what a form submits, which may have `more_settings` too."""
        return cls.read(cls.with_more_settings(values), origin)

    @model_validator(mode="before")
    @classmethod
    def _take_more_settings(cls, values: Any) -> Any:
        return cls.with_more_settings(values) if isinstance(values, dict) else values

    @classmethod
    def with_more_settings(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Replaces the text `more_settings` of the form by the settings that it holds.

        Raises EclectusError for a setting that is unknown, wrong or given by name as well.
        """
        if MORE not in values:
            return values
        by_name = {name: value for name, value in values.items() if name != MORE}
        hidden = cls().model_dump(mode="json", exclude={name for name in cls.model_fields if cls.is_basic(name)})
        if hidden.items() <= by_name.items():
            # The form of a deployment without parameters starts from the flow's defaults and submits all of them.
            by_name = {name: value for name, value in by_name.items() if name not in hidden}
        more = parse_settings(str(values[MORE] or ""), MORE)
        cls.read(more, MORE)
        for name in more:
            if name in by_name:
                raise EclectusError(
                    f"setting '{name}' is given twice: {by_name[name]!r} in its own field and {more[name]!r} in "
                    f"{MORE}; take it out of {MORE}"
                )
        return {**by_name, **more}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema of Prefect's form, which draws `properties` by `position`.

        The other settings stand under `patternProperties`: no form draws those, and the server still accepts and checks
        them by name, from the API and from deployments.
        """
        schema = handler(core)
        form = handler.resolve_ref_schema(schema)
        fields = form["properties"]
        names = [name for group in cls.grouped().values() for name in group]
        basic = [name for name in names if cls.is_basic(name)]
        form["properties"] = {name: {**fields[name], "position": position} for position, name in enumerate(basic)}
        form["properties"][MORE] = {**MORE_FIELD, "position": len(basic)}
        form["patternProperties"] = {f"^{name}$": fields[name] for name in names if name not in basic}
        return schema


# mypy's pydantic plugin gives every model a model_construct of its own, which differ between bases: ignored below.
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
    NewVocabularySettings,
    BudgetSettings,
    ReplaySettings,
    PackSettings,
    DataReportSettings,
):
    """From sources to training instances."""

    def check_together(self) -> None:
        super().check_together()
        # Models that exist already have their new words.
        if self.extension_vocabulary and not getattr(self, "evaluate_checkpoints", None):
            self._check_new_words()
        if self.conversations and self.tokenizer == TRAINED_HERE:
            raise EclectusError(
                "conversations is true, but the tokenizer is trained here and has no chat template; set tokenizer to "
                "the folder or hub name of the model that is to be tuned"
            )
        wanted = [*self.original_languages, *self.expanded_languages]
        for name in ("language_budgets", "language_weights"):
            for language in amounts(getattr(self, name)):
                if language not in wanted:
                    raise EclectusError(
                        f"{name} names language '{language}', which is neither original nor expanded; take it out, or "
                        "add it to one of the two"
                    )

    def _check_new_words(self) -> None:
        """Raises EclectusError where there is no tokenizer to append tokens to, or no language to do it for."""
        given = any(getattr(self, name, None) for name in ("base_model", "dense_start"))
        if self.tokenizer == TRAINED_HERE and not given:
            raise EclectusError(
                f"extension_vocabulary is {self.extension_vocabulary}, but the tokenizer is trained here, on all "
                "languages, and needs no new words; give the model that has one (base_model), or set it to 0"
            )
        if not self.expanded_languages:
            raise EclectusError(
                f"extension_vocabulary is {self.extension_vocabulary}, but expanded_languages is empty; name the "
                "languages that get new words, or set it to 0"
            )


class RepeatSettings(Settings):
    """How often the models of a run are trained. Steps know the seed of one training only, as their `seed`."""

    seeds: int = Field(
        1,
        ge=1,
        description="Trainings of every model, with the seeds seed, seed + 1, ... Intervals and the gate then know the "
        "spread between trainings. Training takes this many times as long; the data is prepared once.",
        json_schema_extra=BASIC,
    )
    training_seed: int = Field(
        -1,
        ge=-1,
        description="Seed of the first training, if it differs from `seed`, the seed of data and evaluation: one more "
        "training on the same data. -1: the same seed.",
    )


class PretrainParameters(RepeatSettings, PretrainSettings, CurateParameters):  # type: ignore[misc]
    """From sources to a Lory model and its dense twin."""

    def check_together(self) -> None:
        super().check_together()
        _refuse_conversations(self)
        if self.pretrains:
            check_segment(self, self.instance_tokens)

    @property
    def seed_of_training(self) -> int:
        """Seed of the first training. The first one of a run on its own has the seed of the data, too."""
        return self.seed if self.training_seed < 0 else self.training_seed

    @property
    def seed_label(self) -> str:
        """What labels of steps and names of models end with: " seed 1", or nothing for the seed of the data."""
        return "" if self.seed_of_training == self.seed else f" seed {self.seed_of_training}"

    @property
    def training(self) -> dict[str, Any]:
        """Settings of a training stage that depend on its seed: that of the data reads the instances as packed."""
        return {"seed": self.seed_of_training, "reordered": self.seed_of_training != self.seed}

    def trainings(self) -> list[Self]:
        """The parameters of each training alone, in the order in which they run; itself if there is only one."""
        if self.seeds == 1:
            return [self]
        first = self.seed_of_training
        return [
            self.model_copy(update={"seeds": 1, "training_seed": each}) for each in range(first, first + self.seeds)
        ]


class ExtendParameters(ExtendSettings, AddExpertsSettings, PretrainParameters):  # type: ignore[misc]
    """From a dense checkpoint to one that knows new languages too."""

    leading: ClassVar[tuple[str, ...]] = ("extension",)
    # Whether a run without expanded languages is an error; evaluation has the same settings and works without.
    must_extend: ClassVar[bool] = True

    base_model: str = Field(
        "",
        description="Model to extend: a folder, a .gguf file, an artifact's name or tag, or a name on the hub. A dense "
        "model (Llama, Mistral, Qwen2, Qwen3), an extended one, or a Lory model. Empty: pre-train one.",
        json_schema_extra=BASIC,
    )
    extension_base: Literal["dense", "lory"] = Field(
        "dense", description="Which of the pre-trained models is extended if base_model is empty."
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
        if self.extends and self.pretrains:
            self._check_experts()

    def _check_experts(self) -> None:
        """Raises EclectusError for numbers of experts that do not fit the model that is pre-trained."""
        if self.extension_base == "lory" and self.lory_experts == 1:
            raise EclectusError(
                "extension_base is lory, and lory_experts 1 makes a model without routers; choose more experts, or "
                "extension_base dense"
            )
        given, layers = self.extension_experts_per_layer, self.model_layers
        if self.extension_base == "lory" or not self.has_custom_shape:
            return
        if given and len(given) != layers:
            raise EclectusError(
                f"extension_experts_per_layer has {len(given)} numbers, and model_layers is {layers}; give one for each"
            )
        if 0 < self.extension_expert_budget < layers:
            raise EclectusError(
                f"extension_expert_budget {self.extension_expert_budget} is less than one new expert in each of "
                f"model_layers {layers}; raise it"
            )
        if self.extension_method == "llama_pro" and self.llama_pro_blocks > layers:
            raise EclectusError(
                f"llama_pro_blocks {self.llama_pro_blocks} is more than one new block for each of model_layers "
                f"{layers}; lower it"
            )

    @property
    def pretrains(self) -> bool:
        return not self.base_model

    @property
    def extends(self) -> bool:
        return bool(self.expanded_languages)


def _refuse_conversations(parameters: IngestSettings) -> None:
    if parameters.conversations:
        raise EclectusError(
            "conversations is true, and such packs are for other trainers: run eclectus curate, then "
            "eclectus export-instances; to train or evaluate here, set it to false"
        )


class SimilarityParameters(
    FlowParameters, LayerSimilaritySettings, FetchSettings, IngestSettings, LanguageSettings, SplitSettings
):
    """From sources and a dense checkpoint to experts for each layer."""

    leading: ClassVar[tuple[str, ...]] = ("extension",)

    def check_together(self) -> None:
        super().check_together()
        _refuse_conversations(self)
        for name, value in (("base_model", self.base_model), ("expanded_languages", self.expanded_languages)):
            if not value:
                raise EclectusError(
                    f"{name} is empty; similarity is that of a model's layers between known and new languages"
                )


class EvaluationParameters(  # type: ignore[misc]
    EvaluateSettings, BenchmarkSettings, ContaminationSettings, ReportSettings, ExtendParameters
):
    """Settings of evaluation, gate and report, shared by the flows that evaluate."""

    @property
    def context(self) -> int:
        # So that models of Lory have no look-ahead.
        return max(self.evaluation_context, self.lory_segment)

    def check_together(self) -> None:
        super().check_together()
        context, tokens = self.context, self.evaluation_tokens
        by = "lory_segment" if context == self.lory_segment else "evaluation_context"
        if 0 < tokens <= context:
            raise EclectusError(
                f"evaluation_tokens {tokens} leaves nothing to score after a context of {by} {context} tokens; "
                f"raise it, or lower {by}"
            )
        if self.pretrains and not self.dense_start:
            if tokens > self.instance_tokens:
                raise EclectusError(
                    f"evaluation_tokens {tokens} is more than the positions of the models, instance_tokens "
                    f"{self.instance_tokens}; lower it"
                )
            if context >= self.instance_tokens:
                raise EclectusError(
                    f"instance_tokens {self.instance_tokens} leaves nothing to score after a context of {by} "
                    f"{context} tokens; raise it, or lower {by}"
                )


class EvaluateParameters(EvaluationParameters):
    """Evaluation and report of the models of pre-training and extension."""

    leading: ClassVar[tuple[str, ...]] = ("evaluation",)
    must_extend = False

    evaluate_checkpoints: list[str] = Field(
        [],
        description="Models to evaluate, each with its own tokenizer: artifact names, folders, .gguf files, names on "
        "the hub; `eclectus evaluate MODEL MODEL` names them too. Empty: those of the other settings.",
        json_schema_extra=BASIC,
    )
    gate: str = Field(
        "",
        description="YAML file with the promotion rules, such as configs/gate.yaml. Empty: nothing is promoted.",
        json_schema_extra=BASIC,
    )

    def check_together(self) -> None:
        super().check_together()
        if self.gate:
            from eclectus.tasks.promotion.gate import read_gates

            read_gates(self.gate)
        for name in ("seeds", "training_seed") if self.evaluate_checkpoints else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise EclectusError(
                    f"{name} is {getattr(self, name)}, but evaluate_checkpoints names models that are trained already, "
                    f"so nothing is trained; leave out one of them (--{name.replace('_', '-')} "
                    f"{type(self).model_fields[name].default})"
                )

    @property
    def pretrains(self) -> bool:
        return super().pretrains and not self.evaluate_checkpoints

    @property
    def extends(self) -> bool:
        return super().extends and not self.evaluate_checkpoints


class MainParameters(EvaluateParameters):
    """The whole job: curate, pre-train, extend, evaluate, report."""

    leading: ClassVar[tuple[str, ...]] = ()


class RetrainParameters(NewDocumentsSettings, RefreshSettings, EvaluationParameters):  # type: ignore[misc]
    """Scheduled retraining: lists its sources, trains on from the champion, promotes what passes the gate."""

    leading: ClassVar[tuple[str, ...]] = ("retraining",)

    retrain_line: str = Field(
        "extended",
        description="Line of champions in the gate's file that is retrained.",
        json_schema_extra=BASIC,
    )
    gate: str = Field(
        "configs/gate.yaml",
        description="YAML file with the promotion rules.",
        json_schema_extra=BASIC,
    )

    def check_together(self) -> None:
        super().check_together()
        gate_of(self)


class FileParameters(MainParameters, RetrainParameters):  # type: ignore[misc]
    """Every setting that a config file may hold: one file serves all flows."""


# Groups of settings in `--help` and forms, by the classes that define them; the last class that defines a setting
# counts.
GROUPS: dict[str, tuple[type[Settings], ...]] = {
    "documents": (IngestSettings, ConversationSettings, LanguageSettings, SplitSettings),
    "grouping": (
        EmbeddingText,
        EmbedSettings,
        StaticEmbeddingSettings,
        NeighborSettings,
        GroupSettings,
        DuplicateSettings,
    ),
    "packing": (
        TokenizerSettings,
        BeginSettings,
        PackSettings,
        ConversationPackSettings,
        DocumentMaskSettings,
        BudgetSettings,
        ReplaySettings,
    ),
    "model": (ArchitectureSettings, LorySettings),
    "pre-training": (PretrainSettings,),
    "extension": (
        MethodSettings,
        NewVocabularySettings,
        UpcycleSettings,
        AddExpertsSettings,
        LayerSimilaritySettings,
        PostPretrainSettings,
        ReviewSettings,
        ExtendParameters,
    ),
    "all training": (RepeatSettings, TrainingSettings),
    "evaluation": (EvaluateSettings, VocabularySettings, BenchmarkSettings, ContaminationSettings, EvaluateParameters),
    "retraining": (NewDocumentsSettings, RefreshSettings, RetrainParameters),
    "reports": (DataReportSettings, IntervalSettings, ReportSettings),
    "trackers": (TrackerSettings,),
    "where it runs": (CurationWorkerSettings, WorkerSettings),
}

PARAMETERS: dict[str, type[FlowParameters]] = {
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
    from eclectus.tasks.training.extend_settings import recipe_of

    lines, line = read_gates(parameters.gate), parameters.retrain_line
    if line not in lines:
        raise EclectusError(f"retrain_line '{line}' is not in {parameters.gate}; its lines are {', '.join(lines)}")
    recipe = recipe_of(parameters.extension_method)
    made = ["stage 1", "stage 2"] if recipe.reviewed else [recipe.title]
    if lines[line].model not in made:
        raise EclectusError(
            f"line '{line}' of {parameters.gate} evaluates '{lines[line].model}', and retraining by extension_method "
            f"{parameters.extension_method} makes {' and '.join(made)}; choose another retrain_line or method"
        )
    return lines[line]

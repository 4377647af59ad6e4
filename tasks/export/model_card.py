"""The model card of a checkpoint, written from lineage: data, languages, settings and scores as they were journaled.

Nothing needs input from the user: what the lineage does not have (a folder from elsewhere, a model that was never
evaluated) is left out or reported as unknown. The front matter is what model hubs read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eclectus.storage.lineage.connection import connect
from eclectus.tasks.rights.proofs import root_of_training, training_documents

if TYPE_CHECKING:
    from eclectus.storage.home import Home

CARD = "README.md"
_UPWARD = """
    with recursive up as (
        select artifact, made_by as step from artifacts where artifact = $artifact
        union
        select i.artifact, a.made_by from up join step_inputs i using (step) join artifacts a on a.artifact =
        i.artifact)
    select s.step, s.name, s.label, s.run, a.artifact, a.statistics
    from (select distinct artifact, step from up) join steps s using (step) join artifacts a using (artifact)
    order by s.started"""
_SCORES = """
    select arg_max(a.statistics, s.started)
    from step_inputs i join steps s using (step) join step_outputs o using (step)
    join artifacts a on a.artifact = o.artifact
    where s.name = 'evaluate' and i.name = 'checkpoint' and i.artifact = $artifact"""
_CERTIFIED = """
    select arg_max(a.statistics, s.started)
    from step_inputs i join steps s using (step) join step_outputs o using (step)
    join artifacts a on a.artifact = o.artifact
    where s.name = 'certify' and i.name = 'checkpoint' and i.artifact = $artifact"""
_BASE = """
    select i.artifact from step_inputs i join step_outputs o using (step)
    where i.name = 'checkpoint' and o.artifact = $made"""
# Settings shown on the card, by step; all others are in the lineage.
_SHOWN = {
    "upcycle": ("extension_experts", "extension_top_k", "extension_init", "seed"),
    "add_experts": ("extension_experts", "extension_calibration_tokens", "seed"),
    "extend": (
        "extension_method", "post_pretrain_steps", "post_pretrain_batch", "post_pretrain_learning_rate",
        "balance_weight", "balance_scaling", "review_steps", "review_batch", "review_learning_rate", "lpr_weight",
        "lpr_loss", "weight_decay", "seed",
    ),
}  # fmt: skip


_ORIGINALS = {
    "unchanged": ". Expert 0 and all shared weights are unchanged from the dense model",
    "rounded": ". Expert 0 and all shared weights are the dense model's, rounded to {dtype} by this export",
}
_SAVED = {
    "bytes_per_token": "bytes per token",
    "tokens_per_kilobyte": "tokens",
    "cache_bytes_per_kilobyte": "bytes of KV cache (bfloat16)",
}
_PRETRAINED = {
    "warmup": ", the dense warm-up of a pre-training, which Lory and its dense twin start from",
    "dense": ", the dense twin of a Lory model: trained on the same instances for the same steps",
    "dense_equal_flops": ", a dense model whose training step costs as many FLOPs as a Lory model's, with a wider FFN",
}
_EXTENDED = {
    "full": ", a dense model extended by full fine-tuning: all of its weights trained",
    "lora": ", a dense model extended by LoRA ([arXiv 2106.09685](https://arxiv.org/abs/2106.09685)), with the "
    "adapters merged into the weights",
    "llama_pro": ", a dense model extended by LLaMA-Pro ([arXiv 2401.02415](https://arxiv.org/abs/2401.02415)): only "
    "the inserted blocks trained",
}


@dataclass
class Origin:
    """Lineage of a checkpoint: the steps that led to it, oldest first, and the scores of it and its base.

    documents, root: number of its training documents and the root of their tree (tasks/rights/proofs.py).
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    base_scores: dict[str, float] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    certified: dict[str, Any] = field(default_factory=dict)
    documents: int = 0
    root: str | None = None

    def made_by(self, name: str) -> list[dict[str, Any]]:
        return [each for each in self.steps if each["name"] == name]


def origin_of(home: Home, digest: str) -> Origin:
    """Everything upstream of the artifact with this digest, from the journals of a home."""
    origin = Origin()
    with connect(home) as lineage:
        for step, name, label, run, artifact, statistics in lineage.execute(_UPWARD, {"artifact": digest}).fetchall():
            rows = lineage.execute("select name, value from settings where step = $step", {"step": step}).fetchall()
            settings = {key: json.loads(value) for key, value in rows}
            known = {"name": name, "label": label, "run": run, "artifact": artifact, "settings": settings}
            origin.steps.append(known | {"statistics": json.loads(statistics or "{}")})
        origin.scores = _scores(lineage, digest)
        upcycled = origin.made_by("extend_vocabulary") or origin.made_by("upcycle") or origin.made_by("add_experts")
        certified = lineage.execute(_CERTIFIED, {"artifact": digest}).fetchone()
        origin.certified = json.loads(certified[0]) if certified and certified[0] else {}
        if upcycled:
            first = lineage.execute(_BASE, {"made": upcycled[-1]["artifact"]}).fetchone()
            origin.base_scores = _scores(lineage, first[0]) if first else {}
        for run in dict.fromkeys(each["run"] for each in origin.steps):
            row = lineage.execute(
                "select started, code_version, parameters->'sources' from runs where run = $run", {"run": run}
            ).fetchone()
            if row:
                sources = json.loads(row[2]) if row[2] else []
                origin.runs.append({"run": run, "started": row[0], "code": row[1], "sources": sources})
    documents = training_documents(home, digest)
    origin.documents, origin.root = len(documents), root_of_training(documents)
    return origin


def _scores(lineage: Any, digest: str) -> dict[str, float]:
    found = lineage.execute(_SCORES, {"artifact": digest}).fetchone()
    return json.loads(found[0])["bits_per_byte"]["language"] if found and found[0] else {}


def model_card(name: str, config: dict[str, Any], made: dict[str, Any], origin: Origin) -> str:
    """The card in Markdown. name: of the folder. config: its config.json. made: its upcycle.json, or empty."""
    known, new = _languages(origin)
    parts = [
        _front_matter(config, known + new),
        f"# {name}\n",
        _what(config, made, origin, known, new),
        _data(origin),
        _training(origin),
        _scores_table(origin, known, new),
        _new_words(config, origin),
        _proof(made),
        _lineage(origin),
        served_section(origin.certified) if origin.certified else "",
    ]
    return "\n".join(part for part in parts if part)


def _languages(origin: Origin) -> tuple[list[str], list[str]]:
    for step in reversed(origin.steps):
        if "original_languages" in step["settings"] and step["name"] == "languages":
            return step["settings"]["original_languages"], step["settings"].get("expanded_languages", [])
    return [], []


def _front_matter(config: dict[str, Any], languages: list[str]) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if languages:
        lines += ["language:", *(f"- {language}" for language in languages)]
    tags = ["mixture-of-experts", "moe-lpr"] if config.get("num_experts_per_tok") else ["eclectus"]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---\n"])


def _what(config: dict[str, Any], made: dict[str, Any], origin: Origin, known: list[str], new: list[str]) -> str:
    architecture = (config.get("architectures") or ["model"])[0]
    text = f"A `{architecture}`"
    if config.get("num_experts_per_tok"):
        experts = config.get("experts_per_layer") or config.get("num_local_experts") or config.get("num_experts")
        base = (config.get("upcycled_from") or {}).get("model_type", "dense")
        text += (
            f" with {experts} experts in each layer, of which {config['num_experts_per_tok']} are used per token: a "
            f"{base} model, upcycled and extended by MoE-LPR ([arXiv 2408.11396](https://arxiv.org/abs/2408.11396))"
        )
        text += _ORIGINALS.get(_original_weights(made), "").format(dtype=made.get("original_dtype"))
    else:
        text += _how_trained(origin)
    text += f". The base model knows {', '.join(known)}" if known else ""
    text += f" and was extended to {', '.join(new)}" if new else ""
    notes = "".join(f"\n\n> {note}" for note in made.get("notes", []))
    if made.get("stored_dtype"):
        notes += f"\n\n> Trained in {made['trained_dtype']}, stored in {made['stored_dtype']} by this export."
    if made.get("gguf"):
        return f"{text}.{notes}\n\n```bash\nllama-server -m {made['gguf']}\n```\n"
    # Layers with different numbers of experts need the code that the export carries.
    own = ", trust_remote_code=True" if config.get("experts_per_layer") else ""
    code = "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    code += f'model = AutoModelForCausalLM.from_pretrained("."{own})\n'
    code += 'tokenizer = AutoTokenizer.from_pretrained(".")\n```'
    return f"{text}.{notes}\n\n{code}\n"


def _original_weights(made: dict[str, Any]) -> str:
    """What upcycle.json says of the original weights, verified at the export: unchanged, rounded or changed."""
    if not made or any(stage["method"] == "moe_all" for stage in made.get("trained", [])):
        return "changed"
    return made.get("original_weights", "unchanged")


def _how_trained(origin: Origin) -> str:
    """What a dense model is, by the last step that trained or fetched it."""
    for step in reversed(origin.steps):
        if step["name"] == "pretrain":
            return _PRETRAINED.get(step["settings"].get("pretrain_stage"), "")
        if step["name"] == "extend":
            return _EXTENDED.get(step["settings"].get("extension_method"), "")
        if step["name"] == "fetch":
            return f": {step['statistics'].get('base_model')}, with its weights as they were fetched"
    return ", a dense model"


def _data(origin: Origin) -> str:
    rows = []
    for step in origin.made_by("pack"):
        for language, tokens in step["statistics"].get("tokens_by_language", {}).items():
            rows.append(f"| {step['label'].removeprefix('pack ')} | {language} | {tokens:,} |")
    sources = dict.fromkeys(_last_part(source) for run in origin.runs for source in run["sources"])
    if not rows and not sources:
        return "## Data\n\nUnknown: this checkpoint was not made in the home that it was exported from.\n"
    named = "".join(f"- `{source}`\n" for source in sources)
    table = "| instances | language | tokens |\n|---|---|---|\n" + "\n".join(rows)
    tree = (
        f"\nDocuments: {origin.documents:,}. The root of their Merkle tree (RFC 9162, over sorted ids: the first 32 "
        f"hex digits of a text's SHA-256), with which `eclectus prove` proves what is among them, and what is not: "
        f"`{origin.root}`\n"
    )
    return f"## Data\n\n{named}\n{table}\n{tree if origin.root else ''}"


def _last_part(source: str) -> str:
    """The name alone: paths of the machine are not published."""
    return source.rstrip("/").rsplit("/", 1)[-1]


def _training(origin: Origin) -> str:
    lines = []
    for step in origin.steps:
        shown = {name: step["settings"][name] for name in _SHOWN.get(step["name"], ()) if name in step["settings"]}
        statistics = step["statistics"]
        if step["name"] == "fetch":
            lines.append(f"**{step['label']}**: {statistics.get('base_model')}\n")
        elif step["name"] in _SHOWN or step["name"] == "pretrain":
            facts = [
                f"{name} {statistics[name]:,}"
                for name in ("steps", "tokens", "parameters", "parameters_trained")
                if name in statistics
            ]
            facts += [f"{name} {value}" for name, value in shown.items()]
            lines.append(f"**{step['label']}**: {', '.join(facts)}\n")
    return "## Training\n\n" + "\n".join(lines) if lines else ""


def _scores_table(origin: Origin, known: list[str], new: list[str]) -> str:
    if not origin.scores:
        return "## Scores\n\nThis checkpoint was not evaluated in the home that it was exported from.\n"
    rows = []
    for language in [*known, *new, *(each for each in origin.scores if each not in known + new)]:
        if language in origin.scores:
            ours, base = origin.scores[language], origin.base_scores.get(language)
            kept = f"{base:.3f} | {100 * base / ours:.1f}%" if base else " | "
            rows.append(f"| {language} | {'known' if language in known else 'new'} | {ours:.3f} | {kept} |")
    head = "| language | | bits per byte | base model | kept |\n|---|---|---|---|---|\n"
    return (
        f"## Scores\n\nOn held-out text; kept: bits per byte of the base model over this one's.\n\n{head}"
        + "\n".join(rows)
        + "\n"
    )


def _new_words(config: dict[str, Any], origin: Origin) -> str:
    """What the appended tokens save by language, and how to do without them."""
    found = [step for step in origin.made_by("extend_vocabulary") if step["statistics"].get("new_tokens")]
    if not found:
        return ""
    made = found[-1]["statistics"]
    rows = [
        f"| {language} | " + " | ".join(f"{each[name][0]:,} to {each[name][1]:,}" for name in _SAVED) + " |"
        for language, each in made["languages"].items()
    ]
    text = (
        f"## Vocabulary\n\n{made['new_tokens']:,} tokens were appended to the base's {made['vocabulary_before']:,}; "
        "text of the original languages keeps its tokens. Per kilobyte of held-out text, before and after:\n\n"
        f"| language | {' | '.join(_SAVED.values())} |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    masses = [step["statistics"]["new_token_mass"]["after"] for step in origin.made_by("extend")
              if step["statistics"].get("new_token_mass")]  # fmt: skip
    if masses:
        text += (
            f"\nOn original text new tokens take {masses[-1]['mass']:.2g} of the probability, "
            f"{masses[-1]['bits_per_token']:.2g} bits per token. "
        )
    first = (config.get("vocabulary_before") or [made["vocabulary_before"]])[0]
    return text + (
        f"`model.generate(..., suppress_tokens=list(range({first}, {config['vocab_size']})))` writes with the original "
        "vocabulary only.\n"
    )


def _proof(made: dict[str, Any]) -> str:
    if "max_abs_delta" not in made:
        return ""
    text = (
        f"## Verification\n\nBefore training no logit differed from the {made['base_model_type']} model's by more than "
        f"{made['max_abs_delta']:.2g} (largest logit {made['max_abs_logit']:.3g}; {made['proof']})."
    )
    kept = _original_weights(made)
    if kept == "rounded":
        text += (
            f" That holds for the checkpoint before this export, which rounded its weights to "
            f"{made['original_dtype']}: the base's own bits (SHA-256 `{made['base_digest']}`) are in that checkpoint, "
            "not here."
        )
    elif kept == "unchanged":
        text += (
            f" SHA-256 of the original weights, the same before and after training: `{made['base_digest']}`. "
            "`eclectus export THIS_FOLDER OUT --extract-base` extracts them."
        )
    return text + "\n"


def _lineage(origin: Origin) -> str:
    rows = [f"- run `{each['run']}` of {each['started']:%Y-%m-%d}, code {each['code']}" for each in origin.runs]
    return "## Lineage\n\n" + "\n".join(rows) + "\n" if rows else ""


def served_section(found: dict[str, Any]) -> str:
    """What servers answered with this model, by statistics of a certification (tasks/certify/certify.py)."""
    lines = [
        f"Compared with {found['reference'] or 'nothing'}, in float32, on prompts in several languages: differences of "
        "log-probabilities, and greedy text that is equal or parts where the training model is undecided.",
        "",
        "| server | version | numbers | largest difference | mean | equal texts | tokens | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in found["servers"]:
        tokens = {True: "equal", False: "differ", None: "not compared"}[each["tokens_equal"]]
        verdict = "certified" if each["certified"] else "; ".join(each["faults"])
        lines.append(
            f"| {each['server']} | {each['version']} | {each['dtype']} | {each['max_difference']:.2g} | "
            f"{each['mean_difference']:.2g} | {each['equal_texts']} of {each['texts']} | {tokens} | {verdict} |"
        )
    lines += [f"| {server} | | | | | | | not certified: {why} |" for server, why in found["unavailable"].items()]
    if found["damage"]:
        lines = [f"**Not certified**: {'; '.join(found['damage'])}."]
    notes = "".join(f"\n\n> {note}" for note in found["notes"])
    return "## Served by\n\n" + "\n".join(lines) + notes + "\n"

"""What the training model answers to the prompts: in our code, in float32, from the weights as they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eclectus.tasks.certify.compare import Expected
from eclectus.tasks.certify.prompts import Prompt


def expected_answers(folder: Path, stored: str, prompts: list[Prompt], greedy: int) -> list[Expected]:
    """The training model's log-probabilities and greedy text on each prompt.

    folder: its checkpoint; mixtures run in the form that is trained (models/mixture/experts.py). stored: the type that
    the export's weights were rounded to. greedy: tokens of text. Raises CheckpointError, UnsupportedModelError.
    """
    import torch

    from eclectus.models.checkpoints.door import check_checkpoint, open_model
    from eclectus.models.mixture.experts import split_experts

    model: Any = open_model(folder, dtype=getattr(torch, stored)).float()
    if check_checkpoint(folder).kind == "mixture":
        model = split_experts(model)
    with torch.no_grad():
        return [_answer(model.eval(), prompt.ids, greedy) for prompt in prompts]


def _answer(model: Any, ids: list[int], greedy: int) -> Expected:
    import torch

    text: list[int] = []
    step, past = torch.tensor([ids]), None
    for _ in range(greedy):
        out = model(input_ids=step, past_key_values=past, use_cache=True)
        past, token = out.past_key_values, int(out.logits[0, -1].argmax())
        text.append(token)
        step = torch.tensor([[token]])
    logits = model(input_ids=torch.tensor([ids + text]), use_cache=False).logits[0].float()
    return Expected(logits.log_softmax(-1), len(ids), text, float(logits.abs().max()))

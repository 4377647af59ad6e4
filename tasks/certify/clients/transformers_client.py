"""Answers a request with stock transformers: transformers_client.py REQUEST ANSWER (tasks/certify/measure.py)."""

import importlib
import json
import sys
from typing import Any


def main(request_path: str, answer_path: str) -> None:
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    torch.set_num_threads(request["threads"])
    own_code = bool(request["own_code"])
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        request["model"],
        dtype=getattr(torch, request["dtype"]),
        output_loading_info=True,
        trust_remote_code=own_code,
    )
    wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if wrong:
        raise SystemExit(f"the weights do not fit the class {type(model).__name__}: {json.dumps(wrong)[:300]}")
    answer: dict[str, Any] = {"version": transformers.__version__, "log_probs": [], "greedy": [], "tokens": None}
    model.eval()
    with torch.no_grad():
        for ids in request["prompts"]:
            rows = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
            answer["log_probs"].append([_top(row, request["top"]) for row in rows])
            answer["greedy"].append(_greedy(torch, model, ids, request["greedy"]))
    if request["texts"] is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(request["model"], trust_remote_code=own_code)
        answer["tokens"] = [tokenizer(text, add_special_tokens=True)["input_ids"] for text in request["texts"]]
    with open(answer_path, "w", encoding="utf-8") as file:
        json.dump(answer, file)


def _top(row: Any, top: int) -> dict[str, float]:
    found = row.topk(min(top, len(row)))
    return dict(zip(map(str, found.indices.tolist()), found.values.tolist(), strict=True))


def _greedy(torch: Any, model: Any, ids: list[int], length: int) -> list[int]:
    """The most likely token, `length` times, with the model's cache."""
    step, past, text = torch.tensor([ids]), None, []
    for _ in range(length):
        out = model(input_ids=step, past_key_values=past, use_cache=True)
        past, token = out.past_key_values, int(out.logits[0, -1].argmax())
        text.append(token)
        step = torch.tensor([[token]])
    return text


if __name__ == "__main__":
    main(*sys.argv[1:3])

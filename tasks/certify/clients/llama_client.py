"""Answers a request with llama.cpp's server: python llama_client.py REQUEST ANSWER (tasks/certify/measure.py).

The server gives probabilities of the token that comes next only, so a prompt is sent once for each of its beginnings;
what a beginning shares with the one before is not computed again. It gives none at all where its own next token ends
within a character, so it is made to write a letter: probabilities are those before that.
"""

import importlib
import importlib.metadata
import json
import sys
import urllib.request
from typing import Any


def main(request_path: str, answer_path: str) -> None:
    llama: Any = importlib.import_module("xllamacpp")
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    parameters = llama.CommonParams()
    parameters.model.path = request["model"]
    parameters.n_ctx = request["context"]
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = request["threads"]
    parameters.warmup = False
    # In float32 throughout: by default keys and values are kept in float16.
    parameters.cache_type_k = parameters.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.hostnames, parameters.port = ["127.0.0.1"], 0
    server = llama.Server(parameters)
    address = server.listening_address
    letter = _tokens(address, "a", False)[-1]
    answer: dict[str, Any] = {
        "version": importlib.metadata.version("xllamacpp"), "log_probs": [], "greedy": [], "tokens": None,
    }  # fmt: skip
    for ids in request["prompts"]:
        forced = {"n_predict": 1, "n_probs": request["top"], "logit_bias": [[letter, 1e4]]}
        rows = []
        for end in range(1, len(ids) + 1):
            [row] = _ask(address, "completion", {"prompt": ids[:end], **forced})["completion_probabilities"]
            rows.append({str(each["id"]): each["logprob"] for each in row["top_logprobs"]})
        answer["log_probs"].append(rows)
        text = _ask(address, "completion", {"prompt": ids, "n_predict": request["greedy"], "return_tokens": True})
        answer["greedy"].append(text["tokens"])
    if request["texts"] is not None:
        answer["tokens"] = [_tokens(address, text, True) for text in request["texts"]]
    with open(answer_path, "w", encoding="utf-8") as file:
        json.dump(answer, file)


def _tokens(address: str, text: str, add_special: bool) -> list[int]:
    return _ask(address, "tokenize", {"content": text, "add_special": add_special, "parse_special": False})["tokens"]


def _ask(address: str, what: str, values: dict[str, Any]) -> dict[str, Any]:
    if what == "completion":
        values = {"temperature": 0.0, "cache_prompt": True, "repeat_penalty": 1.0} | values
    asked = urllib.request.Request(
        f"{address}/{what}", json.dumps(values).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=600) as done:
        return json.load(done)


if __name__ == "__main__":
    main(*sys.argv[1:3])

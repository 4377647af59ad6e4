"""Answers a request with vLLM on CPU: python vllm_client.py REQUEST ANSWER (tasks/certify/measure.py)."""

import importlib
import json
import os
import sys
from typing import Any


def main(request_path: str, answer_path: str) -> None:
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["OMP_NUM_THREADS"] = str(request["threads"])
    vllm: Any = importlib.import_module("vllm")
    engine = vllm.LLM(
        request["model"],
        dtype=request["dtype"],
        max_model_len=request["context"],
        max_num_seqs=1,
        max_logprobs=request["top"],
        enforce_eager=True,
        disable_log_stats=True,
        enable_prefix_caching=False,
        trust_remote_code=bool(request["own_code"]),
        skip_tokenizer_init=request["texts"] is None,
    )
    asked = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=request["greedy"],
        ignore_eos=True,
        prompt_logprobs=request["top"],
        logprobs=request["top"],
        detokenize=False,
    )
    answer: dict[str, Any] = {"version": vllm.__version__, "log_probs": [], "greedy": [], "tokens": None}
    for ids in request["prompts"]:
        [done] = engine.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
        rows = [*done.prompt_logprobs[1:], done.outputs[0].logprobs[0]]
        answer["log_probs"].append([{str(token): each.logprob for token, each in row.items()} for row in rows])
        answer["greedy"].append(list(done.outputs[0].token_ids))
    if request["texts"] is not None:
        tokenizer = engine.get_tokenizer()
        answer["tokens"] = [tokenizer.encode(text, add_special_tokens=True) for text in request["texts"]]
    with open(answer_path, "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main(*sys.argv[1:3])

"""Which jobs `lpr_claims.py` runs: every method under every seed, baselines' learning rates, sweeps of our settings.

A job is a dict that `lpr_runs.run_job` takes. needs: names of the jobs before it; the first of them left the checkpoint
that it starts from. priority: (part, seed), lower is earlier. title: its row in the tables; sweep: the table, where it
is not the main one. best_of: jobs of the first seed, whose best learning rate it takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from lpr_sizes import Review, Size

# Factors on the size's stage-1 learning rate to choose among; the second is tried first.
RATES = {
    "full": (0.25, 2.0, 4.0, 1.0, 0.5, 8.0),
    "full_replay": (0.25, 4.0, 0.5, 1.0, 2.0),
    "moe_all": (1.0, 2.0, 4.0, 0.06, 0.25),
    "one_stage": (0.5, 1.0, 2.0),
    "lora": (1.0, 3.0, 9.0),
    "llama_pro": (1.0, 2.0, 4.0),
}
# A pretrained base bears less: at a factor of 2 four steps of full fine-tuning spoiled SmolLM2 in every language.
PRETRAINED = {
    "full": (0.03, 0.1, 0.3),
    "full_replay": (0.03, 0.1, 0.3),
    "moe_all": (0.03, 0.1, 0.3),
    "lora": (0.3, 1.0, 3.0),
    "llama_pro": (0.1, 0.3, 1.0),
}
FIRST, OTHER_RATES, SEEDS, SWEEPS = range(4)
# These have all rates on every base: gain against retention is compared at every rate, not at the best one alone.
ON_EVERY_BASE = ("full", "full_replay", "moe_all", "one_stage")
# What MoE-LPR is compared with, in the order in which it runs.
METHODS = ("full", "no_lpr", "moe_all", "lora", "llama_pro", "random_experts", "one_stage", "full_replay")


class Queue:
    """Makes the jobs of one size."""

    def __init__(self, size: Size, chosen: argparse.Namespace, packed: Path) -> None:
        cuda = torch.cuda.is_available()
        cores = os.cpu_count() or 1
        workers = chosen.workers or (min(10, cores) if cuda and size.shape else 1 if size.shape is None else cores)
        self._size, self._chosen, self._jobs = size, chosen, []
        self._seeds = range(chosen.first_seed, chosen.first_seed + (chosen.seeds if size.shape else 1))
        self._moes: dict[tuple[int, str], str] = {}
        self._common: dict[str, Any] = {
            "packed": str(packed),
            "original": chosen.original,
            "length": size.length,
            "micro_batch": size.micro_batch,
            "workers": workers,
            "threads": max(1, min(torch.get_num_threads(), cores // workers)),
        }
        self._rates = RATES if size.shape else PRETRAINED
        if size.task_limit and chosen.eval:
            languages = [*chosen.original, *chosen.expanded]
            self._common["tasks"] = dict(
                tokenizer=chosen.base_model, folder=str(chosen.eval), languages=languages, limit=size.task_limit
            )
        self._tunes = cuda or size.shape is not None
        self._reviews = size.review_steps * size.review_batch / size.batch

    def jobs(self) -> list[dict[str, Any]]:
        for seed in self._seeds:
            self._methods(seed)
        if not self._chosen.no_sweeps:
            self._sweeps(self._seeds[0])
        return self._jobs

    def _add(self, part: int, seed: int, kind: str, name: str, needs: list[str], **more: Any) -> str:
        full = f"{seed}/{name}"
        job = {"kind": kind, "name": full, "seed": seed, "needs": needs, "priority": (part, seed)}
        job["base_seed"] = self._seeds[0] + (seed - self._seeds[0]) % self._chosen.bases
        self._jobs.append({**job, **self._common, **more})
        return full

    def _methods(self, seed: int) -> None:
        """MoE-LPR, its ablations and all baselines under one seed."""
        size = self._size
        part = FIRST if seed == self._seeds[0] else SEEDS
        review = Review(size.gamma, size.review_rate, size.review_steps)
        ours = self._stage1(part, seed, "copy", title="no review")
        self._review(part, seed, ours, "MoE-LPR", review)
        for method in [method for method in METHODS if method in self._chosen.methods]:
            if method == "no_lpr":
                self._review(part, seed, ours, "review without LPR", dataclasses.replace(review, gamma=0.0))
            elif method == "random_experts":
                random = self._stage1(part, seed, "random", title=None, init="drop", drop_ratio=1.0)
                self._review(part, seed, random, "random new experts", review)
            else:
                self._single(seed, method)

    def _base(self, seed: int) -> str:
        """The base that a seed starts from; one job for each."""
        size = self._size
        own = self._seeds[0] + (seed - self._seeds[0]) % self._chosen.bases
        name = f"{own}/base"
        if not any(job["name"] == name for job in self._jobs):
            more = dict(shape=size.shape, base_model=self._chosen.base_model, rate=size.base_rate)
            self._add(FIRST, own, "base", "base", [], steps=size.base_steps, batch=size.base_batch, **more)
        return name

    def _moe(self, part: int, seed: int, label: str, **more: Any) -> str:
        """The upcycled base; one job for each kind of it."""
        if (seed, label) not in self._moes:
            settings = dict(experts=self._size.experts, top_k=2, init="copy") | more
            needs = [self._base(seed)]
            self._moes[seed, label] = self._add(part, seed, "upcycle", f"moe {label}", needs, upcycle=settings)
        return self._moes[seed, label]

    def _stage1(self, part: int, seed: int, label: str, title: str | None, rate: float = 1.0, **more: Any) -> str:
        size = self._size
        settings = dict(alpha=more.pop("alpha", size.alpha), rate=size.stage1_rate * rate, steps=size.stage1_steps)
        moe = self._moe(part, seed, label if more else "copy", **more)
        return self._add(part, seed, "stage1", f"stage 1 {label}", [moe], title=title, batch=size.batch, **settings)

    def _review(self, part: int, seed: int, start: str, title: str, review: Review, sweep: str | None = None) -> None:
        name = f"{sweep}: {title}" if sweep else title
        more = dict(review=dataclasses.asdict(review), steps=review.steps, rate=review.rate)
        self._add(part, seed, "review", name, [start], title=title, sweep=sweep, batch=self._size.review_batch, **more)

    def _single(self, seed: int, method: str) -> None:
        """A method of one stage, at several learning rates; under later seeds of a base at the best of them."""
        part = FIRST if seed == self._seeds[0] else SEEDS
        factors = self._rates.get(method, ())
        # Where steps are few and dear, the middle one has to do.
        factors = factors if self._tunes else factors[1:2]
        every_base = method in ON_EVERY_BASE and seed < self._seeds[0] + self._chosen.bases
        if not factors:
            start, more = self._training(part, seed, method)
            self._add(part, seed, "single", method, [start], rate=self._size.stage1_rate, **more)
        elif seed != self._seeds[0] and not every_base:
            start, more = self._training(part, seed, method)
            tried = [f"{self._seeds[0]}/{method} x{factor:g}" for factor in factors]
            self._add(part, seed, "single", method, [start, *tried], best_of=tried, rate=0.0, **more)
        else:
            for factor in factors:
                middle = factor == factors[min(1, len(factors) - 1)]
                self._one_rate(part if middle else max(part, OTHER_RATES), seed, method, factor)

    def _one_rate(self, part: int, seed: int, method: str, factor: float) -> None:
        """A method of one stage at a factor of the size's rate."""
        start, more = self._training(FIRST if seed == self._seeds[0] else SEEDS, seed, method)
        rate = self._size.stage1_rate * factor
        self._add(part, seed, "single", f"{method} x{factor:g}", [start], rate=rate, **more)

    def _training(self, part: int, seed: int, method: str) -> tuple[str, dict[str, Any]]:
        """(the job that it starts from, its settings but for the rate) of a method of one stage."""
        size = self._size
        replay = method in ("full_replay", "one_stage")
        start = self._moe(part, seed, "copy") if method in ("moe_all", "one_stage") else self._base(seed)
        steps = size.stage1_steps + (round(self._reviews) if replay else 0)
        more = dict(method=method, title=method, steps=steps, batch=size.batch)
        if method in ("moe_all", "one_stage"):
            more["alpha"] = size.alpha
        if method == "one_stage":
            more["gamma"] = size.gamma
        more["replay_share"] = self._reviews / steps if replay else 0.0
        return start, more

    def _sweeps(self, seed: int) -> None:
        """Reviews of the first seed's stage 1 with other settings, and other stages 1 with a review each."""
        start = f"{seed}/stage 1 copy"
        base = Review(self._size.gamma, self._size.review_rate, self._size.review_steps)
        points: list[tuple[str, dict[str, Any]]] = []
        points += [("gamma", dict(gamma=gamma)) for gamma in (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)]
        points += [("gamma", dict(gamma=gamma, form="released")) for gamma in (0.1, 1.0, 10.0, 100.0)]
        points += [("review", dict(rate=base.rate * factor)) for factor in (0.1, 0.3, 3.0)]
        points += [("review", dict(steps=round(base.steps * factor))) for factor in (0.3, 3)]
        points += [("beyond the paper", dict(away=away)) for away in (0.1, 0.3, 1.0)]
        for sweep, point in points:
            self._review(SWEEPS, seed, start, words(point), dataclasses.replace(base, **point), sweep=sweep)
        stages: list[tuple[str, dict[str, Any]]] = [
            *((f"alpha {alpha:g}", dict(alpha=alpha)) for alpha in (0.0, 0.001, 0.1)),
            *((f"rate x{factor:g}", dict(rate=factor)) for factor in (0.5, 2.0)),
            *((f"{experts} experts", dict(experts=experts)) for experts in (2, 12)),
            ("half-redrawn experts", dict(init="drop")),
        ]
        for title, settings in stages:
            stage = self._stage1(SWEEPS, seed, title, None, **settings)
            self._review(SWEEPS, seed, stage, title, base, sweep="stage 1")


def words(point: dict[str, Any]) -> str:
    """Settings as shown in a table."""
    return ", ".join(
        f"{name} {value:g}" if not isinstance(value, str) else f"{name} {value}" for name, value in point.items()
    )

"""A training step on fake tensors: what it holds at its fullest moment and what each operator moves, without computing.

    parameters, buffers     fake tensors of the model's shapes and dtypes
    forward, backward       the objective's own, on one micro-batch; every operator passes through a dispatch mode
    storages                counted when an operator makes one, until it is freed

Ops that ask for values get an answer of the right size: as many positions as have a target (`nonzero`), a mixture's
tokens choose their experts evenly (models/training/flops.py). Not seen: what kernels take inside, and heaps of the C
library. Cost: about 0.2 ms per operator, a second for 10 layers; a deep model is simulated with a few of its layers,
since activations and operators grow with each layer of a kind by the same.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper
from torch.utils.weak import WeakIdKeyDictionary

from eclectus.models.attention.choice import choose_attention
from eclectus.models.forecast.cut import Cuts, cut, layers_of
from eclectus.models.forecast.job import Job
from eclectus.models.losses.step import Step, targets_of
from eclectus.models.mixture.experts import SplitExperts
from eclectus.models.training.flops import FORMULAS, without_data
from eclectus.models.training.parallel import recompute_blocks
from eclectus.models.training.precision import FrozenWeights, autocast, keep_routers_fp32
from eclectus.models.training.process import Process
from eclectus.models.training.repeatable import switch_off_randomness

aten = torch.ops.aten
# The C library takes smaller blocks from its heap, which has holes.
HEAP = 32 * 2**20
# Models of more layers are simulated by cuts; so many layers of a kind are then added to the first.
WHOLE, MORE_LAYERS = 6, 2
_COUNTS = {**flop_registry, **{op: shape_wrapper(formula) for op, formula in FORMULAS.items()}}


@dataclass(frozen=True)
class Simulated:
    """Bytes of one process that holds the whole model, and the operators of one micro-batch.

    parameters: with buffers. trained: parameters that train. gradients: of all that trains. activations: the most that
    is held besides, gradients excluded; growing: the most of activations and of gradients that are there already, if
    none was before; late: the same while the last layer's gradients are made. small: the most of activations in blocks
    below HEAP bytes; trained_small: trained parameters in tensors below that. layer, root: bytes of the largest decoder
    layer, and of what is in none. operators: {(FLOPs, bytes read and written): how many}, forward and backward.
    """

    parameters: int
    trained: int
    gradients: int
    activations: int
    growing: int
    late: int
    small: int
    trained_small: int
    layer: int
    root: int
    operators: Counter[tuple[int, int]]

    @property
    def flops(self) -> int:
        """Of one micro-batch."""
        return sum(flops * count for (flops, _), count in self.operators.items())

    @property
    def moments(self) -> int:
        """AdamW's."""
        return 8 * self.trained


def simulate(job: Job) -> Simulated:
    """One micro-batch of the job. The model is not changed; of a deep one, cuts are simulated."""
    config: Any = job.model.config
    if job.plan.document_mask and config.model_type == "lory":
        # How many segments there are is read from the documents, and fake ones hold no values.
        job = dataclasses.replace(job, plan=dataclasses.replace(job.plan, document_mask=False))
    layers, cuts = len(layers_of(job.model)), Cuts.of(job.model, MORE_LAYERS)
    if layers <= max(WHOLE, 2 * len(cuts.one)) or job.plan.recomputed > 1:
        return _simulated(job)
    one = _simulated(dataclasses.replace(job, model=cut(job.model, cuts.one)))
    more = {kind: _simulated(dataclasses.replace(job, model=cut(job.model, kept))) for kind, kept in cuts.more.items()}

    def whole(value: Callable[[Simulated], float]) -> int:
        return round(cuts.whole(value(one), {kind: value(each) for kind, each in more.items()}))

    linear = ("parameters", "trained", "gradients", "activations", "small", "trained_small")
    numbers = {name: whole(attrgetter(name)) for name in linear}
    operators = {key for each in (one, *more.values()) for key in each.operators}
    longest = max(more.values(), key=lambda each: each.activations)
    late = longest.late + numbers["gradients"] - longest.gradients
    return Simulated(
        **numbers,
        # The fullest moment is when backward begins or, where gradients are larger than what they free, when it ends.
        growing=max(numbers["activations"], late),
        late=late,
        layer=max(each.layer for each in more.values()),
        root=one.root,
        operators=Counter({key: whole(partial(_count, key)) for key in operators}),
    )


def _count(operator: tuple[int, int], simulated: Simulated) -> int:
    return simulated.operators[operator]


def _simulated(job: Job) -> Simulated:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin: Any = without_data(job.model, mode)
    switch_off_randomness(twin)
    if job.device.type == "cpu":
        choose_attention(twin, job.plan.attention, job.device)
    if job.held:
        with mode:
            FrozenWeights(twin, {})
    keep_routers_fp32(twin)
    if job.plan.recomputed:
        recompute_blocks(twin, job.plan.recomputed)
    batch = job.batch()
    parts, tracker = Step(job.asked, [batch], Process()), _Tracker(len(targets_of(batch.labels)[0]))
    tracker.keep(each for each in [*twin.parameters(), *twin.buffers()])
    trained = [each for each in twin.parameters() if each.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(tracker.accumulated)
    with mode, tracker:
        with autocast(torch.device("cpu"), job.precision):
            loss, terms = parts.measure(twin, 0)
        loss.backward()
        del loss, terms
    room = sum(_room(each) for each in twin.modules()) if job.held else 0
    gradients = sum(_bytes(each) for each in trained)
    layers = [sum(map(_bytes, layer.parameters())) for layer in layers_of(twin)]
    last = [sum(_bytes(each) for each in layer.parameters() if each.requires_grad) for layer in layers_of(twin)]
    return Simulated(
        parameters=sum(_bytes(each) for each in [*twin.parameters(), *twin.buffers()]) + room,
        trained=sum(each.numel() for each in trained),
        gradients=gradients,
        activations=tracker.most,
        growing=max(tracker.by_gradients.values()),
        late=max(most for done, most in tracker.by_gradients.items() if done >= gradients - max(last)),
        small=tracker.most_small,
        trained_small=sum(each.numel() for each in trained if _bytes(each) < HEAP),
        layer=max(layers),
        root=sum(map(_bytes, twin.parameters())) - sum(layers),
        operators=tracker.operators,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _room(module: nn.Module) -> int:
    """Bytes that frozen experts in bfloat16 have in front of them for the new ones (models/mixture/grouped_gemm.py)."""
    if not isinstance(module, SplitExperts):
        return 0
    return 2 * (module.new_gate_up.numel() + module.new_down.numel())


class _Tracker(TorchDispatchMode):
    """Counts storages while they live, gradients of parameters apart, and what operators read, write and compute."""

    def __init__(self, targets: int) -> None:
        """targets: positions that have one."""
        super().__init__()
        self._targets = targets
        self.most = self.most_small = 0
        # By bytes of the gradients that are there, the most that is held with them.
        self.by_gradients: dict[int, int] = {0: 0}
        self.operators: Counter[tuple[int, int]] = Counter()
        self._now = self._gradients = self._small = 0
        # By storage: [bytes, whether it is a gradient].
        self._seen: Any = WeakIdKeyDictionary()

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that are there all the time, which are not counted."""
        self._kept = [each.untyped_storage() for each in tensors]
        for storage in self._kept:
            self._seen[storage] = [0, False]

    def accumulated(self, parameter: Tensor) -> None:
        """After a parameter's gradient was put into `.grad`."""
        assert parameter.grad is not None
        entry = self._seen.get(parameter.grad.untyped_storage())
        if entry and not entry[1]:
            entry[1] = True
            self._leave(entry)
            self._gradients += entry[0]
            held = self._now + self._gradients
            self.by_gradients[self._gradients] = max(self.by_gradients.get(self._gradients, 0), held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.nonzero.default:
            # Fake tensors hold no values: asked for are the positions that have a target.
            out = args[0].new_empty((min(self._targets, args[0].numel()), args[0].ndim), dtype=torch.int64)
        else:
            out = func(*args, **kwargs)
        made = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        new = [each for each in made if self._added(each)]
        read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        in_place = func._schema.is_mutable
        if new or in_place:
            formula = _COUNTS.get(func._overloadpacket)
            flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
            self.operators[flops, sum(map(_bytes, read)) + sum(map(_bytes, new))] += 1
        return out

    def _added(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return False
        entry = self._seen[storage] = [storage.nbytes(), False]
        self._now += entry[0]
        self._small += entry[0] if entry[0] < HEAP else 0
        self.most_small = max(self.most_small, self._small)
        weakref.finalize(storage, self._freed, entry)
        self.most = max(self.most, self._now)
        held = self._now + self._gradients
        self.by_gradients[self._gradients] = max(self.by_gradients.get(self._gradients, 0), held)
        return True

    def _freed(self, entry: list[Any]) -> None:
        if entry[1]:
            self._gradients -= entry[0]
        else:
            self._leave(entry)

    def _leave(self, entry: list[Any]) -> None:
        self._now -= entry[0]
        self._small -= entry[0] if entry[0] < HEAP else 0

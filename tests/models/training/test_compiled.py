"""`training_compiled`: every decoder layer is one graph, without a break, and computes what it did before."""

import pytest
import torch

from eclectus.models.losses.step import Step
from eclectus.models.training.parallel import compile_blocks
from eclectus.models.training.process import Process
from tests.support.gpu_cases import CASES, FAULTS
from tests.support.tiny_training import LENGTH, VOCABULARY, batch_of

KINDS = [case for case in CASES if case not in FAULTS and "recomputed" not in case]


@pytest.mark.slow
@pytest.mark.parametrize("case", KINDS)
def test_a_layer_is_one_graph(case):
    torch.compiler.reset()
    model, objective, _ = CASES[case]()
    tokens = torch.randint(1, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(2):
        model.train().zero_grad()
        loss, _ = Step(objective, [batch_of(tokens)], Process()).measure(model, 0)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
        compile_blocks(model, backend="aot_eager", fullgraph=True)
    (plain, expected), (compiled, gradients) = found
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)

"""Lory under FSDP2: sharded over two processes, it has the gradients of the whole model in one."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from eclectus.models.training.process import Process
from tests.models.lory.test_model import T, lory, tokens
from tests.support.processes import run_group


def compare_with_the_whole_model() -> None:
    rank = Process.current().rank
    mesh, ids = init_device_mesh("cpu", (2,)), tokens(4, 3 * T)
    whole, sharded = lory().train(), lory().train()
    sharded.activation_checkpointing_enable()
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    own = ids[2 * rank : 2 * rank + 2]
    sharded(own, labels=own).loss.backward()
    whole(ids, labels=ids).loss.backward()
    for (name, parameter), expected in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_gradients_sharded_and_checkpointed_equal_the_whole_models():
    run_group(2, compare_with_the_whole_model)

import dataclasses

import pytest
import torch

from eclectus.models.forecast.gpus import GPUS, gpu_named, gpu_of_device
from eclectus.models.forecast.job import Job
from eclectus.models.forecast.roofline import COMPUTE, step_on
from eclectus.models.forecast.simulation import simulate
from eclectus.models.losses import objectives
from eclectus.models.sharding.blueprint import Blueprint
from tests.support.tiny_training import plan


def wide(world=1, layers=4, **changed):
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=layers,
        num_attention_heads=32, max_position_embeddings=4096,
    )  # fmt: skip
    model = Blueprint.of_config(config).model
    chosen = plan(batch=world, micro_batch=1, **changed)
    return Job(model, objectives.next_token(), chosen, world, 4096, device=torch.device("cuda"))


def test_a_type_that_the_table_lacks_is_named_with_those_it_has():
    with pytest.raises(ValueError, match="'h1000' is not in the table; its types are a100-40, a100-80, h100"):
        gpu_named("h1000")
    assert gpu_named("H100") is GPUS["h100"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_a_device_is_found_by_what_cuda_calls_it(name, kind):
    assert gpu_of_device(name) is GPUS[kind]


def test_a_step_takes_no_less_than_its_products_and_its_bytes():
    job = wide()
    simulated = simulate(job)
    parameters = sum(each.numel() for each in job.model.parameters())
    step = step_on(GPUS["h100"], job, simulated, parameters)
    assert simulated.flops / (989e12 * COMPUTE) < step < simulated.flops / 200e12
    half = dataclasses.replace(GPUS["h100"], dense=989 / 2, bandwidth=3350 / 2)
    assert step_on(half, job, simulated, parameters) == pytest.approx(2 * step, rel=0.02)


def test_gradients_over_a_slow_network_cost_time():
    one, many = wide(), wide(world=64)
    simulated = simulate(one)
    parameters = sum(each.numel() for each in one.model.parameters())
    slow = dataclasses.replace(GPUS["h100"], network=1)
    alone = step_on(slow, one, simulated, parameters)
    assert step_on(slow, many, simulated, parameters) > 2 * simulated.gradients / 1e9
    assert step_on(GPUS["h100"], wide(world=8), simulated, parameters) == pytest.approx(alone, rel=0.1)

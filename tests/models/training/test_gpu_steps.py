"""What a training step does on a GPU, seen without one: nothing waits for the device, or cannot run on it."""

import pytest

from tests.support.fake_cuda import build, found_in
from tests.support.gpu_cases import CASES, FAULTS
from tests.support.tiny_training import write_instances

# Sums over a step or a window of steps, one number a loss: in fp32 a count of 17 million tokens would not grow.
ALLOWED = {
    "float64 in losses/step.py __init__",
    "float64 in losses/step.py measure",
    "float64 in training/metrics.py add",
}


OFTEN = ["dense", "lory", "stage 1 llama", "stage 2"]
OTHERS = [case for case in CASES if case not in FAULTS and case not in OFTEN]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("gpu")
    write_instances(place / "instances")
    build(place)
    return place


@pytest.fixture(scope="module")
def found(folder):
    return found_in(folder, [*OFTEN, *FAULTS])


@pytest.fixture(scope="module")
def found_in_others(folder):
    return found_in(folder, OTHERS)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", OFTEN)
def test_no_step_waits_for_the_device_or_does_what_it_cannot(found, case):
    assert set(found[case]) - ALLOWED == set()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", OTHERS)
def test_no_step_of_the_other_models_does(found_in_others, case):
    assert set(found_in_others[case]) - ALLOWED == set()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_does_is_found(found, fault):
    assert any(FAULTS[fault] in each and "gpu_cases.py" in each for each in found[fault]), found[fault]

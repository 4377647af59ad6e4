"""The merged FFN against the direct form: values, gradients, memory, autocast and torch.compile."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from eclectus.models.lory.merge import apply_merged, merge_experts, merged_ffn, reference_merged_ffn, segments_per_block


def draw(batch=2, segments=3, tokens=5, width=4, ffn=6, experts=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = dict(dtype=dtype, generator=generator)
    x = torch.randn(batch, segments, tokens, width, **make)
    weights = torch.randn(batch, segments, experts, **make).softmax(-1)
    theta = torch.randn(experts, 3 * ffn, width, **make) * width**-0.5
    return tuple(tensor.requires_grad_() for tensor in (x, weights, theta))


def block_of(segments, theta):
    """The byte budget for blocks of that many segments."""
    return segments * 2 * theta[0].numel() * theta.element_size()


@pytest.mark.parametrize("block", [1, 4, 6])
def test_gradients_pass_gradcheck_in_float64_whatever_the_block(block):
    x, weights, theta = draw(tokens=3, width=3, ffn=2)
    assert torch.autograd.gradcheck(lambda *inputs: merged_ffn(*inputs, block_of(block, theta)), (x, weights, theta))


@pytest.mark.parametrize("block", [1, 5, 32])
def test_values_and_gradients_equal_the_direct_form_in_float32(block):
    x, weights, theta = draw(4, 8, 16, 32, 48, 8, torch.float32)
    gradient = torch.randn_like(x)
    ours = merged_ffn(x, weights, theta, block_of(block, theta))
    reference = reference_merged_ffn(x, weights, theta)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weights, theta), gradient),
        torch.autograd.grad(reference, (x, weights, theta), gradient),
        strict=True,
    ):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_an_input_that_needs_no_gradient_changes_none_of_the_others(frozen):
    inputs = list(draw())
    expected = list(torch.autograd.grad(reference_merged_ffn(*inputs).sin().sum(), inputs))
    inputs[frozen] = inputs[frozen].detach()
    asked = [tensor for tensor in inputs if tensor.requires_grad]
    del expected[frozen]
    for a, b in zip(torch.autograd.grad(merged_ffn(*inputs).sin().sum(), asked), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_without_gradients_the_values_are_the_same():
    inputs = draw()
    with torch.no_grad():
        torch.testing.assert_close(merged_ffn(*inputs), reference_merged_ffn(*inputs))


def test_applying_merged_parameters_equals_merging_and_applying_at_once():
    x, weights, theta = draw(batch=1)
    torch.testing.assert_close(
        apply_merged(x[0], merge_experts(weights, theta)[0]), reference_merged_ffn(x, weights, theta)[0]
    )
    torch.testing.assert_close(
        apply_merged(x[0], merge_experts(weights, theta)[0, :1]),
        reference_merged_ffn(x, weights[:, :1].expand_as(weights), theta)[0],
    )


def test_bf16_autocast_computes_in_bf16_and_returns_fp32_gradients_close_to_fp32s():
    inputs = draw(2, 4, 16, 32, 48, 4, torch.float32)
    exact = torch.autograd.grad(reference_merged_ffn(*inputs).square().sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = merged_ffn(*inputs, block_of(2, inputs[2]) // 2)
    assert output.dtype == torch.bfloat16
    for a, b in zip(torch.autograd.grad(output.float().square().sum(), inputs), exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.03 * b.norm()


def test_torch_compile_needs_no_graph_break_and_agrees():
    torch.compiler.reset()
    x, weights, theta = draw()
    compiled = torch.compile(merged_ffn, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(reference_merged_ffn(x, weights, theta).sin().sum(), (x, weights, theta))
    for a, b in zip(
        torch.autograd.grad(compiled(x, weights, theta).sin().sum(), (x, weights, theta)), expected, strict=True
    ):
        torch.testing.assert_close(a, b)


def peak_bytes(step):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    allocations, pending = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag.name == "Allocation":
            allocations.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, size in sorted(allocations):
        held += size
        peak = max(peak, held)
    return peak


def test_memory_beyond_the_activations_does_not_grow_with_the_number_of_segments():
    def extra(segments, merge):
        inputs = draw(1, segments, 4, 32, 64, 4, torch.float32)
        activations = segments * 4 * (2 * 64) * 4
        peak = peak_bytes(lambda: torch.autograd.grad(merge(*inputs).sum(), inputs))
        return peak - 4 * activations

    def blocks_of_four(*inputs):
        return merged_ffn(*inputs, block_of(4, inputs[2]))

    merged_bytes = 3 * 64 * 32 * 4
    assert extra(64, blocks_of_four) - extra(16, blocks_of_four) < 2 * merged_bytes
    assert extra(64, reference_merged_ffn) - extra(16, reference_merged_ffn) > 48 * merged_bytes


def test_blocks_are_even_and_never_empty():
    assert segments_per_block(10, 100, "cpu", block_bytes=800) == 4
    assert segments_per_block(10, 100, "cpu", block_bytes=1) == 1
    assert segments_per_block(3, 100, "cuda", block_bytes=None) == 3
    assert segments_per_block(9, 100, "cpu", block_bytes=8 * 200) == 5


def test_shapes_that_do_not_fit_are_named():
    x, weights, theta = draw()
    with pytest.raises(ValueError, match=r"weights \(2, 2, 3\)"):
        merged_ffn(x, weights[:, :2], theta)

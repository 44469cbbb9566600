"""What only a CUDA device can show: its fused routes compute the written-out attention, forward and backward."""
import pytest
import torch

import common
import masks
import model as networks
import objectives
from conftest import LAYOUTS, STRUCTURES, random_examples, random_tokens
from data import Example, lay_out
from generate import generate
from test_families import families, randomised, small

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
WIDE = dict(heads=4, kv_heads=2, width=64)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # relative to the largest value; bf16 has 8 bits


def close(x: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Equal up to a share of the largest value."""
    difference = (x.double().cpu() - expected.double().cpu()).abs().max()
    assert difference <= tolerance * expected.abs().max().double().cpu(), float(difference)


def values_and_gradients(network, batch, made: masks.Masks) -> list[torch.Tensor]:
    """The logits at all real positions, and what every parameter's gradient of their loss is."""
    real = batch.document >= 0
    logits_NV = network(batch, made, real)
    objectives.language_model_loss(logits_NV, batch.targets[real] % logits_NV.shape[1]).backward()
    return [logits_NV.detach(), *(parameter.grad for parameter in network.parameters())]


def on_both_devices(network, batch) -> tuple[list, list]:
    """The same network and batch on the CPU, under a dense mask, and on the GPU, by its own routes."""
    structure = network.config.structure
    network.requires_grad_(True)
    expected = values_and_gradients(network, batch, masks.of_batch(structure, batch))
    network.zero_grad(set_to_none=True)
    batch = batch.to("cuda")
    found = values_and_gradients(network.to("cuda"), batch, masks.of_batch(structure, batch))
    return found, expected


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T", [7, 128, 500])
def test_the_causal_route(T, dtype):
    """cuDNN's kernel, or the next one that can, under no mask tensor."""
    q, k, v, out = (torch.randn(2, heads, T, 64, dtype=dtype, device="cuda") for heads in (6, 2, 2, 6))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y = networks.attention(*inputs, masks.causal)
    heads = [exact[0], *(x.repeat_interleave(3, dim=1) for x in exact[1:])]
    z = networks.written_out_attention(*heads, masks.dense(masks.causal, 2, T, T, "cuda"))
    for found, expected in zip((y, *torch.autograd.grad(y, inputs, out)),
                               (z, *torch.autograd.grad(z, exact, out.double()))):
        close(found, expected, TOLERANCE[dtype])


def test_cudnn_runs_the_causal_route():
    """In bf16 it is the first of the order that can."""
    q, k, v = (torch.randn(2, heads, 256, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        networks.attention(q, k, v, masks.causal)
    assert any("cudnn_attention" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_structure_learns_the_same_on_both_devices(structure, layout, batch_of, random_model):
    """Logits and all gradients: FlexAttention under the BlockMask of each structure, packed, padded, shared."""
    network = random_model(structure, layers=2, **WIDE)
    for found, expected in zip(*on_both_devices(network, batch_of(structure, layout))):
        close(found, expected, 1e-4)


@families
def test_a_family_learns_the_same_on_both_devices(name, batch_of):
    """With trained biases as tensors, other biases in the fused kernel, and any width of head."""
    network = randomised(small(name))
    for found, expected in zip(*on_both_devices(network, batch_of(network.config.structure, "packed"))):
        close(found, expected, 2e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_batches_of_all_shapes(structure, tokenizer, random_model):
    """One row and several, shorter and longer than a block: the fused kernel's logits are the dense mask's."""
    network = random_model(structure, layers=1, **WIDE)
    for n in range(12):
        lengths = [(20 + 37 * n % 90, [30 + 53 * n % 150]) for _ in range(2 + n % 5)]
        batch = lay_out(random_examples(lengths), structure, 250, tokenizer)
        expected = network.cpu()(batch, masks.of_batch(structure, batch), batch.loss_mask)
        batch = batch.to("cuda")
        close(network.cuda()(batch, masks.of_batch(structure, batch), batch.loss_mask), expected, 1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_compiled_model_is_the_same(structure, batch_of, random_model):
    network = random_model(structure, layers=1, **WIDE).to("cuda")
    batch = batch_of(structure, "packed").to("cuda")
    made, real = masks.of_batch(structure, batch), batch.document >= 0
    compiled = common.wrap(network, common.Run(None, torch.device("cuda"), torch.float32), True)
    close(compiled(batch, made, real), network(batch, made, real), 1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_cached_decoding_equals_uncached(structure, dtype, tokenizer, random_model):
    """Greedy, the answers are those of the CPU token by token; in bf16 the cache holds what attention reads."""
    network = random_model(structure, layers=2, **WIDE)
    prompts = [random_tokens(n) for n in (3, 9, 1, 30)]
    expected = generate(network, prompts, tokenizer, 12, temperature=0.0)
    network = network.to("cuda")
    run = common.Run(None, torch.device("cuda"), dtype)
    with run.autocast():
        answers = generate(network, prompts, tokenizer, 12, temperature=0.0)
    if dtype == torch.float32:
        assert answers == expected
    for prompt, answer in zip(prompts, answers):         # the likeliest token of a fresh forward, or next to it
        batch = lay_out([Example(prompt, [answer])], structure, 1, tokenizer).to("cuda")
        with run.autocast():
            logits = network(batch, masks.of_batch(structure, batch), batch.loss_mask).float()
        chosen = logits[torch.arange(len(answer)), torch.tensor(answer, device="cuda")]
        ordinary = logits[:, list(tokenizer.text) + [tokenizer.end]].max(-1).values
        assert ((ordinary - chosen) <= (1e-4 if dtype == torch.float32 else 0.3)).all()

"""The networks: who influences whom, and every fused or shared computation against its plain loop."""
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import common
import masks
import model as networks
import positions as positions_file
import objectives
from conftest import LAYOUTS, STRUCTURES, may_look, random_examples
from data import Example, lay_out
from model import ModelConfig
from shapes import check_shapes


def outputs(network, batch) -> torch.Tensor:
    """Logits at every position (B, T, V), or scores (B, T, 1)."""
    everywhere = torch.ones_like(batch.tokens, dtype=torch.bool)
    made = masks.of_batch(network.config.structure, batch)
    return network(batch, made, everywhere).view(*batch.tokens.shape, -1)


# ---- who influences whom -----------------------------------------------------------------------------------

def reach(step: torch.Tensor, layers: int) -> torch.Tensor:
    """Where one gets along at most `layers` steps; staying is possible, through the residual stream."""
    step = (step | torch.eye(len(step), dtype=torch.bool)).long()
    return torch.linalg.matrix_power(step.double(), layers) > 0


def influence(structure: str, batch, b: int, layers: int) -> dict[str, torch.Tensor]:
    """{field of the batch: (T, n) bool}: does position n of that field reach position T's output in row b?"""
    T = batch.tokens.shape[1]
    own = torch.tensor([[may_look(structure, batch, b, i, j) for j in range(T)] for i in range(T)])
    if structure != "encdec":
        return {"tokens": reach(own, layers)}
    source = batch.source_document[b]
    encoder = reach(source[:, None] == source[None, :], layers)
    cross = batch.document[b][:, None] == source[None, :]
    entered = cross.double() @ encoder.double()        # at the first layer's cross-attention at the earliest
    return {"tokens": reach(own, layers), "source": reach(own, layers - 1).double() @ entered > 0}


@pytest.mark.parametrize("layers, scalar", [(1, False), (3, False), (2, True)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_token_moves_exactly_what_may_see_it(structure, layout, layers, scalar, batch_of, random_model):
    """Change one token: a real position's output moves if and only if a path of allowed looks leads to it.

    With one layer that is the mask itself. Outputs elsewhere do not move at all, not even in the last bit.
    """
    network, batch = random_model(structure, layers), batch_of(structure, layout)
    moves_as_allowed(networks.ScalarModel(network) if scalar else network, batch, layers, range(len(batch.tokens)))


def moves_as_allowed(network, batch, layers: int, rows) -> None:
    """Each token of these rows is changed in turn."""
    before, real = outputs(network, batch), batch.document >= 0
    for b in rows:
        for field, expected in influence(network.config.structure, batch, b, layers).items():
            for j in range(expected.shape[1]):
                tokens = getattr(batch, field).clone()
                tokens[b, j] = (tokens[b, j] + 1) % 256
                moved = (outputs(network, replace(batch, **{field: tokens})) != before).any(-1) & real
                expected_moved = torch.zeros_like(moved)
                expected_moved[b] = expected[:, j] & real[b]
                assert torch.equal(moved, expected_moved), f"{field}[{b}, {j}]"


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_each_layer_lets_information_travel_one_window_further(layers, random_model):
    """Under a sliding window the reach grows with depth: here a path of looks is more than a single look."""
    network, n = random_model("causal", layers), 12
    window = masks.dense(masks.causal & masks.sliding_window(3), 1, n, n)
    tokens, positions = torch.randint(256, (1, n)), torch.arange(n)[None]
    before = network.decode(tokens, positions, window)
    for j in range(n):
        changed = tokens.clone()
        changed[0, j] = (changed[0, j] + 1) % 256
        moved = (network.decode(changed, positions, window) != before).any(-1)[0]
        assert moved.tolist() == [0 <= i - j <= 2 * layers for i in range(n)]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_neighbours_in_a_batch_change_nothing(structure, random_model, tokenizer, monkeypatch):
    """Logits of every target are those of its pair alone: positions, too, restart where they should."""
    packed_equals_alone(random_model(structure, layers=2), tokenizer, monkeypatch, atol=2e-5)


def packed_equals_alone(network, tokenizer, monkeypatch, atol: float) -> None:
    """Four documents in two rows, some with several targets, and every pair in a row of its own."""
    structure = network.config.structure
    examples = random_examples([(5, [3, 6, 2]), (0, [4]), (2, [5, 1]), (7, [2])])
    rows = {4: [[2, 0], [3, 1]], 1: [[0]]}
    monkeypatch.setattr("data.balanced_rows", lambda sizes, row_length: rows[len(sizes)])
    batch = lay_out(examples, structure, 0, tokenizer)
    together = outputs(network, batch)
    for document, example in enumerate(examples):
        for part, target in enumerate(example.targets, start=1):
            alone = lay_out([Example(example.source, [target])], structure, 0, tokenizer)
            torch.testing.assert_close(together[(batch.document == document) & (batch.part == part)],
                                       outputs(network, alone)[alone.part == 1], atol=atol, rtol=0)


# ---- attention and its routes ------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_routes_give_the_same_logits(structure, layout, batch_of, random_model, monkeypatch):
    """Written-out attention, SDPA and FlexAttention are one model, with grouped query heads."""
    by_every_route(random_model(structure, layers=2), batch_of(structure, layout), monkeypatch, atol=1e-5)


def by_every_route(network, batch, monkeypatch, atol: float) -> None:
    """With SDPA as training takes it, with FlexAttention, and written out over dense masks and biases."""
    structure = network.config.structure
    (B, T), allowed = batch.tokens.shape, masks.predicates(structure, batch)
    S = T if batch.source is None else batch.source.shape[1]
    sizes, real = ((T, T), (S, S), (T, S)), batch.document >= 0

    def form(build):
        return masks.Masks(*(kind and build(kind, B, *size) for kind, size in zip(allowed, sizes)))

    sdpa = network(batch, masks.of_batch(structure, batch), real)
    flex = network(batch, form(masks.block_mask), real)

    def by_hand(q, k, v, mask, scale):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        if mask.dtype == torch.bool:
            return networks.written_out_attention(q, k, v, mask, scale)
        allowed = mask > float("-inf")
        return networks.written_out_attention(q, k, v, allowed, scale, mask.masked_fill(~allowed, 0))
    monkeypatch.setattr(networks, "attention", by_hand)
    text = network(batch, form(masks.dense), real)
    torch.testing.assert_close(sdpa, text, atol=atol, rtol=0)
    torch.testing.assert_close(flex, text, atol=atol, rtol=0)


@pytest.mark.parametrize("kind", ["causal", "allowed", "biased", "decoding"])
def test_bf16_on_a_cpu_is_the_text(kind):
    """Values and gradients, up to the 8 bits of bf16, of the route that a CPU takes for it."""
    T = 1 if kind == "decoding" else 40
    q, k, v = (torch.randn(3, heads, n, 16).bfloat16() for heads, n in ((4, T), (2, 40), (2, 40)))
    allowed = masks.dense(masks.causal, 3, T, 40) if T > 1 else torch.rand(3, 1, 1, 40) < 0.5
    allowed, bias = allowed | (torch.arange(40) == 0), torch.randn(3, 4, T, 40).bfloat16()
    mask = {"causal": masks.causal, "biased": bias.masked_fill(~allowed, float("-inf"))}.get(kind, allowed)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        if dtype == torch.bfloat16:
            y = networks.attention(*inputs, mask)
        else:
            heads = [inputs[0], *(x.repeat_interleave(2, dim=1) for x in inputs[1:])]
            y = networks.written_out_attention(*heads, allowed, None, bias.to(dtype) if kind == "biased" else None)
        weights = torch.sin(torch.arange(y.numel())).view(y.shape).to(dtype)
        results.append((y, *torch.autograd.grad(y, inputs, weights)))
    for found, expected in zip(*results):
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).abs().max() < 2e-2 * expected.abs().max()


def test_a_gpus_route_for_masks_is_the_text():
    """Bool and additive masks; on a CPU torch has one kernel for it."""
    q, k, v = (torch.randn(2, 4, n, 16) for n in (7, 40, 40))
    allowed = (torch.rand(2, 1, 7, 40) < 0.5) | (torch.arange(40) == 0)
    text = networks.written_out_attention(q, k, v, allowed, scale=0.3)
    for mask in (allowed, torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))):
        torch.testing.assert_close(networks.masked_on_a_gpu(q, k, v, mask, 0.3), text, atol=1e-6, rtol=0)


def test_causal_route_without_a_mask_tensor():
    """The predicate `causal` itself and its dense tensor lead to the same attention."""
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    with_tensor = networks.attention(q, k, v, masks.dense(masks.causal, 2, 9, 9))
    torch.testing.assert_close(networks.attention(q, k, v, masks.causal), with_tensor, atol=1e-6, rtol=0)


def test_written_out_attention_equals_its_formula():
    """A weighted mean of the allowed values, with weights exp(q . k / sqrt(K)), one query at a time."""
    q, k, v = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 6)
    allowed = torch.rand(2, 1, 4, 5) < 0.5
    allowed[..., 0] = True
    result = networks.written_out_attention(q, k, v, allowed)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, (2, 3, 4))).tolist():
        keys = [s for s in range(5) if allowed[b, 0, t, s]]
        weights = [math.exp(float(q[b, h, t] @ k[b, h, s]) / math.sqrt(6)) for s in keys]
        expected = sum(w * v[b, h, s] for w, s in zip(weights, keys)) / sum(weights)
        torch.testing.assert_close(result[b, h, t], expected, atol=1e-6, rtol=1e-5)


def rotated(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """The pair (x_i, x_{i + K/2}) as one complex number, times e^(i position theta^(-2i/K))."""
    half = len(x) // 2
    angle = position * theta ** (-2 * torch.arange(half, dtype=torch.float64) / len(x))
    z = torch.complex(x[:half].double(), x[half:].double()) * torch.exp(1j * angle)
    return torch.cat((z.real, z.imag))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_layer_equals_plain_loops(kv_heads, across):
    """Query head h reads key/value head h // (H / G); with as many of them this is multi-head attention.

    Over the tokens themselves queries and keys are rotated; across, over the encoder's output, they are not.
    """
    config, (T, S) = ModelConfig(heads=4, kv_heads=kv_heads, width=24), (5, 3 if across else 5)
    H, G, K, layer = 4, kv_heads, 6, networks.Attention(config).requires_grad_(False)
    x = torch.randn(2, T, 24)
    memory = torch.randn(2, S, 24) if across else x
    positions, mask = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]), masks.dense(masks.causal, 2, T, S)
    if across:
        result = layer.across(x, layer.keys_values(memory), mask)
    else:
        result = layer(x, mask, positions_file.rotary_angles(positions, K, config.rope_theta))
    head = layer.qkv.weight.double().split(K)            # H queries, then G keys, then G values

    def projected(number, vector, position):
        y = head[number] @ vector.double()
        return y if across or position is None else rotated(y, int(position), config.rope_theta)
    for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(T)).tolist():
        heads, at = [], positions[b]
        for h in range(H):
            g, q, seen = h // (H // G), projected(h, x[b, t], at[t]), range(min(S, t + 1))
            scores = [q @ projected(H + g, memory[b, s], at[s]) / math.sqrt(K) for s in seen]
            weights = torch.softmax(torch.stack(scores), 0)
            heads.append(sum(weights[s] * projected(H + G + g, memory[b, s], None) for s in seen))
        expected = layer.out.weight.double() @ torch.cat(heads)
        torch.testing.assert_close(result[b, t].double(), expected, atol=1e-6, rtol=0)


# ---- the parts ---------------------------------------------------------------------------------------------

def test_rotation_equals_complex_multiplication():
    """Each pair of coordinates turns by position x theta^(-2i/K)."""
    x, positions = torch.randn(1, 1, 6, 8), torch.tensor([[0, 1, 2, 50, 400, 2047]])
    result = networks.rotate(x, *positions_file.rotary_angles(positions, 8, 10000.0))
    for t, position in enumerate(positions[0].tolist()):
        expected = rotated(x[0, 0, t], position, 10000.0).float()
        torch.testing.assert_close(result[0, 0, t], expected, atol=5e-4 if position > 100 else 2e-5, rtol=0)


def test_rotary_scores_depend_on_the_distance_alone():
    """q at p and k at p + d have one score for every p, and another for another d."""
    q, k, distances = torch.randn(8), torch.randn(8), (-7, 0, 1, 5)
    def score(at_q, at_k):
        angles = positions_file.rotary_angles(torch.tensor([[at_q, at_k]]), 8, 10000.0)
        a, b = networks.rotate(torch.stack((q, k))[None, None], *angles)[0, 0]
        return float(a @ b)
    of_distance = {d: [score(p, p + d) for p in (7, 20, 99, 500)] for d in distances}
    for scores in of_distance.values():
        assert scores == pytest.approx([scores[0]] * 4, abs=2e-4)
    assert of_distance[0][0] == pytest.approx(float(q @ k), abs=1e-5)
    first = sorted(scores[0] for scores in of_distance.values())
    assert min(b - a for a, b in zip(first, first[1:])) > 1e-2


def test_rms_norm_equals_its_formula():
    """x / sqrt(mean(x^2) + eps) * weight, one vector at a time; eps matters for small vectors."""
    norm = networks.RMSNorm(6, 1e-5).requires_grad_(False)
    norm.weight.copy_(torch.randn(6))
    x = torch.randn(3, 4, 6) * torch.tensor([1.0, 100.0, 1e-3]).view(3, 1, 1)
    for b in range(3):
        for t in range(4):
            rms = math.sqrt(sum(float(v) ** 2 for v in x[b, t]) / 6 + 1e-5)
            torch.testing.assert_close(norm(x)[b, t], x[b, t] / rms * norm.weight, atol=0, rtol=1e-5)


def test_swiglu_equals_its_formula():
    """W_out (silu(W_gate x) * W_up x), with the gate in the upper half of the joint matrix."""
    layer = networks.FeedForward(ModelConfig(width=8, heads=2, ffn_width=12)).requires_grad_(False)
    gate, up = layer.inner.weight.split(12)
    x = torch.randn(8)
    z = gate @ x
    expected = layer.out.weight @ (z / (1 + torch.exp(-z)) * (up @ x))
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=0)


def test_cache_is_filled_in_order_and_refuses_more():
    """append returns all keys and values so far, per layer, and raises when the cache is full."""
    cache = networks.KVCache(ModelConfig(layers=2, heads=4, kv_heads=2, width=32), B=3, S=5, device="cpu")
    k, v = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8)
    for start, end in ((0, 3), (3, 4), (4, 5)):
        for layer in range(2):
            keys, values = cache.append(layer, (1 + layer) * k[:, :, start:end], v[:, :, start:end])
            assert torch.equal(keys, (1 + layer) * k[:, :, :end]) and torch.equal(values, v[:, :, :end])
        cache.length = end
    with pytest.raises(ValueError, match="holds 5 tokens; 6 were asked for"):
        cache.append(0, k[:, :, :1], v[:, :, :1])


# ---- the network as built ----------------------------------------------------------------------------------

@pytest.mark.parametrize("structure", STRUCTURES)
def test_first_loss_is_ln_v(structure, batch_of, tokenizer):
    """A network as built predicts every token with probability 1/V."""
    network = networks.build(ModelConfig(structure, tokenizer.vocab, layers=2, width=32))
    batch = batch_of(structure, "packed")
    logits = network(batch, masks.of_batch(structure, batch), batch.loss_mask)
    loss = objectives.language_model_loss(logits, batch.targets[batch.loss_mask]) / batch.loss_mask.sum()
    assert loss.item() == pytest.approx(math.log(tokenizer.vocab), rel=1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_parameter_learns(structure, batch_of, random_model):
    """No weight is out of the loss's sight."""
    network, batch = random_model(structure, layers=2).requires_grad_(True), batch_of(structure, "packed")
    logits = network(batch, masks.of_batch(structure, batch), batch.loss_mask)
    objectives.language_model_loss(logits, batch.targets[batch.loss_mask]).backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_outputs_are_given_where_asked(structure, scalar, batch_of, random_model):
    """`where` picks positions row by row, of logits and of scores."""
    network, batch = random_model(structure), batch_of(structure, "packed")
    network = networks.ScalarModel(network) if scalar else network
    everywhere, made = outputs(network, batch), masks.of_batch(structure, batch)
    where = torch.rand(batch.tokens.shape) < 0.3
    expected = [everywhere[b, t] for b in range(where.shape[0]) for t in range(where.shape[1]) if where[b, t]]
    picked = network(batch, made, where).view(len(expected), -1)
    torch.testing.assert_close(picked, torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("structure, stacks, crossed", [("causal", 1, 0), ("prefix", 1, 0), ("encdec", 2, 1)])
@pytest.mark.parametrize("heads, kv_heads, width, ffn", [(4, 2, 32, 96), (4, 4, 48, 128), (2, 1, 16, 64)])
def test_parameter_count(structure, stacks, crossed, heads, kv_heads, width, ffn):
    """Embeddings, and per layer attention, feed-forward (8/3 of the width, up to 32s) and norms, by hand; a
    scalar model has a vector and its bias in place of the unembedding.
    """
    V, L, D = 70, 3, width
    attention = D * (D + 2 * kv_heads * D // heads) + D * D
    stack = L * (attention + D + 3 * D * ffn + D) + D
    config = ModelConfig(structure, V, L, heads, kv_heads, width)
    expected = 2 * V * D + stacks * stack + crossed * L * (attention + D)
    network = networks.build(config)
    assert networks.parameter_count(network) == expected
    assert networks.parameter_count(networks.ScalarModel(network)) == expected - V * D + D + 1


@pytest.mark.parametrize("wrong", [
    {"structure": "decoder"}, {"vocab": 0}, {"layers": 0}, {"heads": 0}, {"kv_heads": -1}, {"width": 0},
    {"heads": 3, "kv_heads": 3}, {"heads": 128, "kv_heads": 1}, {"kv_heads": 3}])
def test_impossible_sizes_are_refused_in_a_sentence(wrong):
    """The message names the field and the value that was given."""
    with pytest.raises(ValueError) as error:
        ModelConfig(**wrong)
    message, (name, value) = str(error.value), next(iter(wrong.items()))
    assert name in message and str(value) in message and len(message.split()) > 5


@pytest.mark.parametrize("structure", STRUCTURES)
def test_scalar_model_normalises_its_output(structure, batch_of, random_model):
    """The score is (head . hidden - mean) / std, in fp32, with the head drawn near zero."""
    trunk, batch = random_model(structure, layers=2), batch_of(structure, "candidates")
    hidden = trunk.hidden(batch, masks.of_batch(structure, batch))
    scorer = networks.ScalarModel(trunk).requires_grad_(False)
    assert scorer.head.bias == 0 and scorer.head.weight.abs().max() < 4 * 33 ** -0.5
    scorer.mean.fill_(0.7), scorer.std.fill_(2.5), scorer.head.bias.fill_(0.3)
    scores = outputs(scorer, batch).squeeze(-1)
    assert scores.dtype == torch.float32
    for b, t in torch.cartesian_prod(*map(torch.arange, batch.tokens.shape)).tolist():
        raw = sum(float(w * h) for w, h in zip(scorer.head.weight[0].double(), hidden[b, t].double())) + 0.3
        assert scores[b, t].item() == pytest.approx((raw - 0.7) / 2.5, abs=1e-5)


# ---- bf16 on a CPU -----------------------------------------------------------------------------------------

def test_few_sizes_have_seven_significant_binary_digits():
    sizes = [networks.few_sizes(n) for n in range(1, 5000)]
    assert all(n <= size <= n + n / 64 for n, size in enumerate(sizes, start=1))
    assert sizes[:128] == list(range(1, 129)) and len(set(sizes[1024:2048])) == 64


def test_products_in_bf16_have_few_sizes_and_nothing_else_changes(batch_of, random_model, monkeypatch):
    """Counted positions are filled up before the largest product, and what fills them up is cut off again."""
    network, batch, sizes = random_model("causal", layers=1), batch_of("causal", "packed"), []
    made, everywhere = masks.of_batch("causal", batch), torch.ones_like(batch.tokens, dtype=torch.bool)
    logits_of = network.logits
    monkeypatch.setattr(networks, "few_sizes", lambda n: n + 5)
    monkeypatch.setattr(network, "logits", lambda hidden_ND: sizes.append(len(hidden_ND)) or logits_of(hidden_ND))
    plain = network(batch, made, everywhere)
    with torch.autocast("cpu", torch.bfloat16):
        filled = network(batch, made, everywhere)
    n = everywhere.numel()
    assert sizes == [n, n + 5] and filled.shape == plain.shape and filled.dtype == torch.bfloat16
    assert (filled - plain).abs().max() < 0.05 * plain.std()


def test_answers_are_sampled_in_fp32_on_a_cpu():
    run = common.Run(Path("nowhere"), torch.device("cpu"), torch.bfloat16)
    with run.autocast():
        assert torch.is_autocast_enabled("cpu")
    with run.autocast(sampling=True):
        assert not torch.is_autocast_enabled("cpu")


# ---- shapes live in names ----------------------------------------------------------------------------------

@pytest.mark.parametrize("structure", STRUCTURES)
def test_shapes_are_what_names_say(structure, batch_of, random_model):
    """Every suffixed local of the model's functions has the dimensions of its name, each letter one size."""
    batch, network = batch_of(structure, "packed"), random_model(structure, layers=2)
    made = masks.of_batch(structure, batch)
    _, seen = check_shapes(network, batch, made, batch.loss_mask)
    assert {"forward", "attention", "rotary_angles", "rotate", "joined", "decode"} <= set(seen)
    T, S = batch.tokens.shape[1], 7
    q, k, allowed = torch.randn(2, 4, T, 8), torch.randn(2, 4, S, 8), torch.ones(2, 4, T, S, dtype=torch.bool)
    _, seen = check_shapes(networks.written_out_attention, q, k, k, allowed)
    assert seen["written_out_attention"] == 6


def test_shape_checker_finds_a_wrong_name():
    """The checker itself can fail: on a size that differs, and on a dimension too many."""
    q, k, allowed = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.ones(2, 4, 5, 7, dtype=torch.bool)
    with pytest.raises(AssertionError, match="allowed_BHTS has shape"):
        check_shapes(networks.written_out_attention, q, k, k, allowed[:, :1])
    with pytest.raises(AssertionError, match="positions_BT has shape"):
        check_shapes(positions_file.rotary_angles, torch.zeros(2, 3, 1), 8, 10000.0)

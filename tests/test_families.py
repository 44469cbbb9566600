"""The published families: their exact sizes, and every variant against plain loops written from its paper."""
import cmath
import math
from dataclasses import replace

import pytest
import torch

import masks
import model as networks
import positions as positions_file
import objectives
from conftest import LAYOUTS, random_tokens
from data import Batch, Example, lay_out
from generate import generate
from model import KVCache, ModelConfig, preset
from presets import PRESETS
from shapes import check_shapes
from test_model import by_every_route, moves_as_allowed, outputs, packed_equals_alone

PUBLISHED = {
    "gpt2": 124_439_808, "gpt3-175b": 174_604_259_328, "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320,
    "llama-65b": 65_285_660_672, "llama2-70b": 68_976_648_192, "baichuan-7b": 7_000_559_616,
    "baichuan-13b": 13_264_901_120, "t5-small": 60_506_624, "t5-base": 222_903_552, "t5-large": 737_668_096,
    "t5-11b": 11_307_321_344, "flan-t5-small": 76_961_152, "flan-t5-base": 247_577_856,
    "flan-t5-xxl": 11_135_332_352, "bart-base": 139_420_416, "bart-large": 406_291_456,
    "falcon-7b": 6_921_720_704, "falcon-40b": 41_303_293_952, "chatglm-6b": 6_173_286_400,
    "chatglm2-6b": 6_243_584_000}
ROUNDED = {"palm-8b": 8.63e9, "palm-62b": 62.50e9, "palm-540b": 540.35e9, "u-palm-540b": 540.35e9,
           "glm-130b": 128.7e9, "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1558e6,
           "gpt3-125m": 125e6, "gpt3-350m": 356e6, "gpt3-760m": 760e6, "gpt3-1.3b": 1.3e9,
           "gpt3-2.7b": 2.7e9, "gpt3-6.7b": 6.7e9, "gpt3-13b": 13e9,
           "llama-30b": 32.5e9, "llama2-7b": 6.74e9, "llama2-13b": 13.02e9, "t5-3b": 2.85e9,
           "flan-t5-large": 783e6, "flan-t5-xl": 2.85e9}

# one of each family, and the heads that a small one gets: query heads, key/value heads
HEADS = {"gpt2": (4, 4), "llama2-7b": (4, 4), "llama2-70b": (4, 2), "baichuan-13b": (6, 6),
         "palm-540b": (4, 1), "u-palm-540b": (4, 1), "falcon-7b": (3, 1), "falcon-40b": (4, 2),
         "chatglm-6b": (4, 4), "chatglm2-6b": (4, 2), "glm-130b": (4, 4), "t5-small": (4, 4),
         "flan-t5-small": (4, 4), "bart-base": (4, 4)}
families = pytest.mark.parametrize("name", HEADS)


def positions_2d(batch: Batch) -> torch.Tensor:
    """ChatGLM's two positions: the index in the source, and 1, 2, ... in a target, whose first position stays
    that of the source's last token.
    """
    both = torch.stack((batch.positions, torch.zeros_like(batch.positions)))
    for b, t in (batch.part > 0).nonzero().tolist():
        first = (batch.document[b] == batch.document[b, t]) & (batch.part[b] == batch.part[b, t])
        start = batch.positions[b][first].min()
        both[0, b, t], both[1, b, t] = start - 1, batch.positions[b, t] - start + 1
    return both


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_have_chatglms_two_positions(layout, batch_of):
    """The layout gives them to every batch."""
    batch = batch_of("prefix", layout)
    assert torch.equal(batch.positions_2d, positions_2d(batch))


def small(name: str, **changes) -> ModelConfig:
    """A family at toy sizes; what makes it that family stays."""
    heads, kv_heads = HEADS[name]
    sizes = dict(layers=2, width=24 if heads == 3 else 32, heads=heads, kv_heads=kv_heads, vocab=387)
    sizes |= {"head_width": 8} if heads in (3, 6) else {}
    sizes |= {"max_positions": 40} if PRESETS[name].get("positions") == "learned" else {}
    return preset(name, **{**sizes, **changes})


def randomised(config: ModelConfig) -> networks.LanguageModel:
    """Every weight random, so that none can hide."""
    model = networks.build(config).requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=float(parameter_name.endswith("weight")), std=0.3)
    for module in model.modules():
        if isinstance(module, (torch.nn.Embedding, networks.RelativeBias)):
            torch.nn.init.normal_(module.weight)
    return model


# ---- sizes -------------------------------------------------------------------------------------------------

def test_parameter_counts_are_the_published_ones():
    """Exactly, where the released weights tell; to the digits of the paper elsewhere. Every preset is one or
    the other.
    """
    assert set(PUBLISHED) | set(ROUNDED) == set(PRESETS) and not set(PUBLISHED) & set(ROUNDED)
    for name in PRESETS:
        with torch.device("meta"):
            count = networks.parameter_count(networks.build(preset(name)))
        if name in PUBLISHED:
            assert count == PUBLISHED[name], name
        else:
            assert count == pytest.approx(ROUNDED[name], rel=0.02 if "gpt3" in name else 1e-3), name


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="no preset 'lama2-7b'.*mean 'llama2-7b'"):
        preset("lama2-7b")


def test_a_scaled_preset_keeps_its_variants_and_proportions():
    """Only sizes differ: T5-11B's heads stay together 16 x as wide as the network, LLaMA 2's shared by 8."""
    for name in PRESETS:
        full, tiny = vars(preset(name)), vars(preset(name, layers=2, width=64, heads=8))
        changed = {field for field in full if full[field] != tiny[field]}
        assert changed <= {"layers", "width", "heads", "kv_heads", "head_width", "ffn_width"}
    assert (preset("t5-11b", width=64, heads=8).head_width, preset("t5-11b", width=64).heads) == (128, 8)
    assert (preset("llama2-70b", width=1024).heads, preset("llama2-70b", width=2048).kv_heads) == (8, 2)
    assert preset("palm-540b", width=384).head_width == 256


@pytest.mark.parametrize("wrong", [
    {"norm": "batch"}, {"ffn": "swish"}, {"positions": "sine"}, {"bias": "some"}, {"init": "none"},
    {"rope_share": 0.0}, {"embedding_gradient": 2.0}, {"head_width": 7}, {"head_width": 6, "rope_share": 0.5},
    {"head_width": 6, "positions": "rope2d"}, {"max_positions": 9}, {"positions": "learned"},
    {"norm_bias": True}, {"block": "parallel", "norm_place": "post"},
    {"block": "parallel_two_norms", "structure": "encdec"},
    {"positions": "rope2d", "structure": "encdec"}, {"positions": "alibi", "rope_interleaved": True}])
def test_variants_that_exclude_each_other_are_refused_in_a_sentence(wrong):
    with pytest.raises(ValueError) as error:
        ModelConfig(**wrong)
    message = str(error.value)
    assert any(field in message for field in wrong) and len(message.split()) > 5


# ---- who influences whom, packing, routes, cache -----------------------------------------------------------

@pytest.mark.parametrize("layout", ["packed", "candidates"])
@families
def test_a_token_moves_exactly_what_may_see_it(name, layout, batch_of):
    """Whatever the parts, the mask alone decides."""
    model = randomised(small(name))
    moves_as_allowed(model, batch_of(model.config.structure, layout), layers=2, rows=range(1))


@families
def test_packing_changes_nothing(name, tokenizer, monkeypatch):
    """Positions restart with every document, so a row of several gives each what it gets alone."""
    packed_equals_alone(randomised(small(name)), tokenizer, monkeypatch, atol=5e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@families
def test_routes_give_the_same_logits(name, batch_of, monkeypatch):
    """Written-out attention, SDPA and FlexAttention are one network, with any bias and scale."""
    model = randomised(small(name))
    by_every_route(model, batch_of(model.config.structure, "packed"), monkeypatch, atol=3e-5)


@families
def test_shapes_are_what_names_say(name, batch_of):
    model = randomised(small(name))
    batch = batch_of(model.config.structure, "packed")
    check_shapes(model, batch, masks.of_batch(model.config.structure, batch), batch.loss_mask)


@pytest.mark.parametrize("name", ["baichuan-13b", "llama2-70b", "gpt2"])
def test_a_causal_row_needs_no_mask_tensor(name):
    """The predicate `causal` itself and its tensor are one mask, also where a bias must be merged with it."""
    model, tokens = randomised(small(name)), torch.randint(256, (2, 9))
    positions = torch.arange(9).expand(2, 9)
    with_tensor = model.decode(tokens, positions, masks.dense(masks.causal, 2, 9, 9))
    torch.testing.assert_close(model.decode(tokens, positions, masks.causal), with_tensor, atol=1e-5, rtol=0)


def positions_of(name: str, places_BT: torch.Tensor, n_prompt_B1: torch.Tensor) -> torch.Tensor:
    """The positions of the given places in rows of a prompt and what follows it."""
    if name != "chatglm-6b":
        return places_BT
    after_BT = (places_BT - n_prompt_B1 + 1).clamp(min=0)
    return torch.stack((places_BT - after_BT, after_BT))


def whole(name: str, model, row: list[int], n_prompt: int, start: int = 1) -> torch.Tensor:
    """Logits at every token of one row, without a cache. The encoder-decoder reads the prompt as its source
    and begins its target with `start`.
    """
    structure, cross = model.config.structure, ()
    if structure == "encdec":
        source, row = torch.tensor([row[:n_prompt]]), [start] + row[n_prompt:]
        S, everything = n_prompt, masks.bidirectional
        memory = model.encode(source, torch.arange(S)[None], masks.dense(everything, 1, S, S))
        cross = (memory, masks.dense(everything, 1, len(row), S))
    n = len(row)
    after_prompt = (torch.arange(n) >= n_prompt).long()[None]
    allowed = masks.causal | masks.prefix(after_prompt) if structure == "prefix" else masks.causal
    positions = positions_of(name, torch.arange(n)[None], torch.tensor([[n_prompt]]))
    mask = masks.dense(allowed, 1, n, n)
    return model.logits(model.decode(torch.tensor([row]), positions, mask, *cross))[0]


@families
def test_cached_decoding_equals_reading_the_whole_row(name):
    """Left-padded prompts of unequal length read at once, then token by token; one row leaves on the way."""
    model = randomised(small(name))
    structure, longest, n_prompt_B1 = model.config.structure, 4, torch.tensor([[4], [1], [3]])
    places, cross = torch.arange(longest) - longest + n_prompt_B1, ()
    tokens = torch.randint(256, (3, longest)).masked_fill(places < 0, 0)
    new, document, places = torch.randint(256, (3, 4)), -(places < 0).long(), places.clamp(min=0)
    rows = [row[-n:] + after for row, n, after in zip(tokens.tolist(), (4, 1, 3), new.tolist())]
    within = masks.same_document(document, document)
    if structure == "encdec":
        memory = model.encode(tokens, places, masks.dense(within, 3, longest, longest))
        cross = (memory, masks.dense(masks.padding(document), 3, 1, longest))
        tokens, places, document = torch.ones_like(new[:, :1]), 0 * places[:, :1], 0 * document[:, :1]
    P = tokens.shape[1]
    allowed = within if structure == "prefix" else masks.causal & within | masks.padding_query(document)
    cache = KVCache(model.config, 3, P + 4, "cpu")
    positions = positions_of(name, places, n_prompt_B1)
    hidden = model.decode(tokens, positions, masks.dense(allowed, 3, P, P), *cross, cache=cache)
    kept = torch.tensor([0, 1, 2])
    for step in range(5):
        for i, b in enumerate(kept.tolist()):
            expected = whole(name, model, rows[b], int(n_prompt_B1[b]))[step - 5]
            torch.testing.assert_close(model.logits(hidden[i, -1]), expected, atol=5e-5, rtol=0)
        if step == 1:
            kept = torch.tensor([0, 2])
            cache.keep(kept)
            cross = tuple(x[kept] for x in cross)
        if step < 4:
            real = torch.cat((document[kept] >= 0, torch.ones(len(kept), 1 + step, dtype=torch.bool)), dim=1)
            positions = positions_of(name, places[kept, -1:] + 1 + step, n_prompt_B1[kept])
            tokens = new[kept, step:step + 1]
            hidden = model.decode(tokens, positions, real[:, None, None], *cross, cache=cache)


@pytest.mark.parametrize("name", ["llama2-70b", "baichuan-13b", "chatglm2-6b", "flan-t5-small"])
def test_generate_takes_the_most_likely_token(name, tokenizer):
    """Greedy decoding by generate.py, against the row read anew at every step."""
    model, prompts = randomised(small(name, vocab=tokenizer.vocab)), [random_tokens(n) for n in (5, 1, 3)]
    never = [token for token in tokenizer.specials.values() if token != tokenizer.end]
    for prompt, answer in zip(prompts, generate(model, prompts, tokenizer, max_new=5, temperature=0)):
        row = [tokenizer.bos] + prompt
        for token in answer:
            logits = whole(name, model, row, 1 + len(prompt), start=tokenizer.bos)[-1]
            logits[never] = float("-inf")
            assert token == int(logits.argmax())
            row.append(token)


# ---- every family by plain loops, from its paper's equations -----------------------------------------------

def layer_norm(x, w, eps):
    """(x - mean) / sqrt(variance + eps) * weight + bias, one vector at a time."""
    rows = []
    for v in x.tolist():
        mean = sum(v) / len(v)
        variance = sum((a - mean) ** 2 for a in v) / len(v)
        rows.append([(a - mean) / math.sqrt(variance + eps) for a in v])
    return torch.tensor(rows, dtype=torch.float64) * w["weight"] + w.get("bias", 0)


def rms_norm(x, w, eps):
    rows = [[a / math.sqrt(sum(b * b for b in v) / len(v) + eps) for a in v] for v in x.tolist()]
    return torch.tensor(rows, dtype=torch.float64) * w["weight"]


def elementwise(f):
    return lambda x: torch.tensor([[f(a) for a in row] for row in x.tolist()], dtype=torch.float64)


relu = elementwise(lambda a: max(a, 0.0))
gelu = elementwise(lambda a: a * (1 + math.erf(a / math.sqrt(2))) / 2)
gelu_tanh = elementwise(lambda a: a / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a ** 3))))
silu = elementwise(lambda a: a / (1 + math.exp(-a)))


def plain(f):
    return lambda inner: f(inner)


def gated(f):
    return lambda inner: f(inner[:, :inner.shape[1] // 2]) * inner[:, inner.shape[1] // 2:]


# how attention A, feed-forward M and their norms NA and NM make a block of N layers' network
def before(x, A, M, NA, NM, N):
    y = x + A(NA(x))
    return y + M(NM(y))


def after(x, A, M, NA, NM, N):
    y = NA(x + A(x))
    return NM(y + M(y))


def deepnorm(x, A, M, NA, NM, N):
    y = NA((2 * N) ** 0.5 * x + A(x))
    return NM((2 * N) ** 0.5 * y + M(y))


def chatglm(x, A, M, NA, NM, N):
    a = NA(x)
    h = (2 * N) ** 0.5 * a + A(a)
    b = NM(h)
    return (2 * N) ** 0.5 * b + M(b)


def one_norm(x, A, M, NA, NM, N):
    y = NA(x)
    return x + A(y) + M(y)


def two_norms(x, A, M, NA, NM, N):
    return x + A(NA(x)) + M(NM(x))


# how a query or key of one head (K numbers) turns with its positions (place, place in the target)
def turned(pairs, width, place, x):
    """x_a + i x_b times e^(i place theta_j), theta_j = 10000^(-2j/width), for the j-th pair (a, b)."""
    y = list(x)
    for j, (a, b) in enumerate(pairs):
        z = complex(x[a], x[b]) * cmath.exp(1j * place * 10000 ** (-2 * j / width))
        y[a], y[b] = z.real, z.imag
    return y


def halves(K):
    return [(i, i + K // 2) for i in range(K // 2)]


def stay(x, places):
    return x


def rope(x, places):
    return turned(halves(len(x)), len(x), places[0], x)


def half_rope(x, places):
    half = len(x) // 2
    return turned([(2 * i, 2 * i + 1) for i in range(half // 2)], half, places[0], x)


def rope_2d(x, places):
    half = len(x) // 2
    return (turned(halves(half), half, places[0], x[:half]) + turned(halves(half), half, places[1], x[half:]))


def t5_bucket(distance: int, bidirectional: bool) -> int:
    """key - query -> bucket. After the exact ones, bucket exact + i begins at exact (128 / exact)^(i / n):
    distance^n exact^i >= 128^i exact^n, in whole numbers.
    """
    n, first = (16, 16 * (distance > 0)) if bidirectional else (32, 0)
    d, exact = abs(distance) if bidirectional else max(-distance, 0), n // 2
    if d < exact:
        return first + d
    begun = (i for i in range(exact) if d ** exact * exact ** i >= 128 ** i * exact ** exact)
    return first + exact + max(begun)


def alibi_slopes(H: int) -> list[float]:
    """The recursion of Press et al.'s code."""
    if math.log2(H).is_integer():
        return [2 ** (-8 * (h + 1) / H) for h in range(H)]
    power = 2 ** math.floor(math.log2(H))
    return alibi_slopes(power) + alibi_slopes(2 * power)[0::2][:H - power]


FAMILY = {    # norm, block, feed-forward, turn, scale of scores, scale of logits by the width
    "gpt2": (layer_norm, before, plain(gelu_tanh), stay, True, False),
    "llama2-7b": (rms_norm, before, gated(silu), rope, True, False),
    "llama2-70b": (rms_norm, before, gated(silu), rope, True, False),
    "baichuan-13b": (rms_norm, before, gated(silu), stay, True, False),
    "palm-540b": (layer_norm, one_norm, gated(silu), rope, True, True),
    "u-palm-540b": (layer_norm, one_norm, gated(silu), rope, True, True),
    "falcon-7b": (layer_norm, one_norm, plain(gelu), rope, True, False),
    "falcon-40b": (layer_norm, two_norms, plain(gelu), rope, True, False),
    "chatglm-6b": (layer_norm, chatglm, plain(gelu_tanh), rope_2d, True, False),
    "chatglm2-6b": (rms_norm, before, gated(silu), half_rope, True, False),
    "glm-130b": (layer_norm, deepnorm, gated(gelu), rope, True, False),
    "t5-small": (rms_norm, before, plain(relu), stay, False, True),
    "flan-t5-small": (rms_norm, before, gated(gelu_tanh), stay, False, False),
    "bart-base": (layer_norm, after, plain(gelu), stay, True, False)}


class ByHand:
    """A small network of a family, from its weights by name, one token and one head at a time."""

    def __init__(self, name: str, model):
        self.name, self.config = name, model.config
        self.norm, self.block, self.ffn, self.turn, self.scaled, self.logits_scaled = FAMILY[name]
        self.weights = {key: w.double() for key, w in model.state_dict().items()}

    def of(self, prefix: str) -> dict:
        return {key[len(prefix) + 1:]: w for key, w in self.weights.items() if key.startswith(prefix + ".")}

    def linear(self, prefix: str, x):
        w = self.of(prefix)
        return x @ w["weight"].T + w.get("bias", 0)

    def normed(self, prefix: str):
        return lambda x: self.norm(x, self.of(prefix), self.config.norm_eps)

    def attend(self, prefix, x, memory, allowed, places, bias):
        """One query, one head, one key at a time; places is None across."""
        H, G, K = self.config.heads, self.config.kv_heads, self.config.head_width
        of_x, of_memory = (self.linear(f"{prefix}.qkv", z).tolist() for z in (x, memory))
        part = lambda row, number: row[number * K:(number + 1) * K]
        turn = (lambda v, t: v) if places is None else lambda v, t: self.turn(v, places[t])
        rows = []
        for t in range(len(x)):
            joined, keys = [], [s for s in range(len(memory)) if allowed(t, s)]
            for h in range(H):
                g = H + h // (H // G)
                q = turn(part(of_x[t], h), t)
                scores = [sum(a * b for a, b in zip(q, turn(part(of_memory[s], g), s))) for s in keys]
                scores = [score / math.sqrt(K) if self.scaled else score for score in scores]
                scores = [score + bias(h, t, s) for score, s in zip(scores, keys)]
                weights = [math.exp(score - max(scores)) for score in scores]
                values = [part(of_memory[s], g + G) for s in keys]
                joined += [sum(w * v[i] for w, v in zip(weights, values)) / sum(weights) for i in range(K)]
            rows.append(joined)
        return self.linear(f"{prefix}.out", torch.tensor(rows, dtype=torch.float64))

    def bias(self, stack: str, bidirectional: bool):
        """What is added to the score of head h, query t and key s: T5's table, ALiBi's slopes, or nothing."""
        if f"{stack}.relative.weight" in self.weights:
            table = self.weights[f"{stack}.relative.weight"].tolist()
            return lambda h, t, s: table[t5_bucket(s - t, bidirectional)][h]
        slopes = alibi_slopes(self.config.heads)
        return lambda h, t, s: -slopes[h] * abs(t - s) if self.name.startswith("baichuan-13b") else 0.0

    def stack(self, stack: str, tokens: list[int], allowed, places, memory=None, bidirectional=False):
        x = self.weights["embedding.weight"][tokens]
        if f"{stack}.positions.weight" in self.weights:
            first = 2 if self.name.startswith("bart") else 0
            x = x + self.weights[f"{stack}.positions.weight"][first:first + len(tokens)]
        if self.of(f"{stack}.embedding_norm"):
            x = self.normed(f"{stack}.embedding_norm")(x)
        for i in range(self.config.layers):
            at = f"{stack}.blocks.{i}"
            bias = self.bias(stack, bidirectional)
            A = lambda y: self.attend(f"{at}.attention", y, y, allowed, places, bias)
            M = lambda y: self.linear(f"{at}.ffn.out", self.ffn(self.linear(f"{at}.ffn.inner", y)))
            NA, NM, NC = (self.normed(f"{at}.{which}_norm") for which in ("attention", "ffn", "cross"))
            if memory is None:
                x = self.block(x, A, M, NA, NM, self.config.layers)
                continue
            C = lambda y: self.attend(f"{at}.cross", y, memory, lambda t, s: True, None, lambda h, t, s: 0.0)
            if self.block is after:
                x = NA(x + A(x))
                x = NC(x + C(x))
                x = NM(x + M(x))
            else:
                x = x + A(NA(x))
                x = x + C(NC(x))
                x = x + M(NM(x))
        return self.normed(f"{stack}.norm")(x) if self.of(f"{stack}.norm") else x

    def logits(self, source: list[int], target: list[int]):
        """At every token of the decoder's row."""
        causal, everything = (lambda t, s: s <= t), (lambda t, s: True)
        P, row, memory, allowed = len(source), source + target, None, causal
        if self.config.structure == "encdec":
            memory, row = self.stack("encoder", source, everything, [(0, 0)] * P, bidirectional=True), target
        elif self.config.structure == "prefix":
            allowed = lambda t, s: s < P or s <= t
        places = [(t, 0) for t in range(len(row))]
        if self.name == "chatglm-6b":
            places = [(t, 0) if t < P else (P - 1, t - P + 1) for t in range(len(row))]
        x = self.stack("decoder", row, allowed, places, memory)
        table = "unembedding.weight" if "unembedding.weight" in self.weights else "embedding.weight"
        return x @ self.weights[table].T / (math.sqrt(x.shape[1]) if self.logits_scaled else 1)


@families
def test_a_network_of_the_family_equals_plain_loops(name, tokenizer):
    """Logits of a source and a target, by the network and by loops over tokens, heads and keys."""
    model, source, target = randomised(small(name)), random_tokens(6), random_tokens(11)
    batch = lay_out([Example(source, [target])], model.config.structure, 1, tokenizer)
    expected = ByHand(name, model).logits([tokenizer.bos] + source,
                                          [tokenizer.bos] * (model.config.structure == "encdec") + target)
    torch.testing.assert_close(outputs(model, batch)[0].double(), expected, atol=2e-4, rtol=0)


def test_relative_buckets_equal_their_definition():
    distance = torch.arange(-400, 401)
    for bidirectional in (False, True):
        expected = [t5_bucket(d, bidirectional) for d in distance.tolist()]
        assert positions_file.relative_bucket(distance, bidirectional).tolist() == expected
        assert set(expected) == set(range(32)) - ({16} if bidirectional else set())


def test_relative_bias_beyond_the_farthest_distance():
    """The table by clamped distances is the table by buckets, however far apart the tokens are."""
    bias = networks.RelativeBias(small("t5-small"), bidirectional=True).requires_grad_(False)
    torch.nn.init.normal_(bias.weight)
    query, key = torch.tensor([[0, 500, 130]]), torch.tensor([[0, 127, 128, 129, 400]])
    of = bias(query, key)
    for q, k, h in torch.cartesian_prod(torch.arange(3), torch.arange(5), torch.arange(4)).tolist():
        bucket = t5_bucket(int(key[0, k] - query[0, q]), True)
        assert of[0, h, q, k] == bias.weight[bucket, h]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name, bidirectional", [("t5-small", True), ("t5-small", False), ("baichuan-13b", False)])
def test_fused_routes_add_the_bias_of_every_distance(name, bidirectional):
    """SDPA, with mask and bias in one tensor, and FlexAttention, with a BlockMask and a bias that is not trained,
    against written-out attention: packed rows of several blocks, whose positions begin anew with every document.
    """
    config, (B, T) = small(name), (2, 150)
    H, K = config.heads, config.head_width
    document = torch.sort(torch.randint(0, 3, (B, T)), dim=1).values
    first = torch.searchsorted(document, document)
    positions, allowed = torch.arange(T) - first, masks.same_document(document, document)
    allowed = allowed if bidirectional else allowed & masks.causal
    part = positions_file.RelativeBias(config, bidirectional) if name == "t5-small" else positions_file.Alibi(config)
    if name == "t5-small":
        torch.nn.init.normal_(part.requires_grad_(False).weight)
        bias = [[float(part.weight[t5_bucket(d, bidirectional), h]) for d in range(-T, T)] for h in range(H)]
    else:
        bias = [[-slope * abs(d) for d in range(-T, T)] for slope in alibi_slopes(H)]
    bias_BHTT = torch.tensor(bias)[:, positions[:, None] - positions[:, :, None] + T].transpose(0, 1)
    q, k, v = (torch.randn(B, H, T, K) for _ in range(3))
    dense = masks.dense(allowed, B, T, T)
    expected = networks.written_out_attention(q, k, v, dense, bias_BHTS=bias_BHTT)
    for mask in (dense, masks.block_mask(allowed, B, T, T)):
        biased = positions_file.with_bias(mask, part(positions, positions), B, H, T, T, "cpu")
        torch.testing.assert_close(networks.attention(q, k, v, biased), expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize("H", [1, 2, 3, 5, 8, 12, 32, 40, 71, 96])
def test_alibi_slopes(H):
    """Powers of two and others; Baichuan-13B has 40 heads."""
    config = ModelConfig(heads=H, kv_heads=H, head_width=8, positions="alibi")
    assert networks.Alibi(config).slopes("cpu").tolist() == pytest.approx(alibi_slopes(H), rel=1e-6)


def test_two_dimensional_rotation_depends_on_both_distances_alone():
    """A score is unchanged when both positions of both tokens move on, and changes with either distance."""
    config, (q, k) = small("chatglm-6b"), torch.randn(2, 8)

    def score(query, key):
        places = torch.tensor([query, key]).T[:, None]                          # (2, B = 1, T = 2)
        a, b = networks.rotate(torch.stack((q, k))[None, None], *networks.rotation(places, config))[0, 0]
        return float(a @ b)
    here = score((3, 1), (5, 4))
    assert score((13, 21), (15, 24)) == pytest.approx(here, abs=1e-5)
    assert abs(score((3, 1), (6, 4)) - here) > 1e-3 and abs(score((3, 1), (5, 6)) - here) > 1e-3


def test_chatglms_block_is_deepnorm_begun_one_norm_earlier():
    """alpha norm(x) + f(norm(x)), and a final norm, is DeepNorm behind a norm of the embedding."""
    config = small("chatglm-6b")
    model = randomised(config)
    other = networks.build(replace(config, norm_place="deepnorm", embedding_norm=True, final_norm=False))
    names = [f"blocks.{i}.{which}" for i in range(2) for which in ("attention_norm", "ffn_norm")]
    later = dict(zip(names, [*names[1:], "norm"]))             # each norm is named after what it feeds
    weights = model.state_dict()
    for key in other.state_dict():
        for own, source in (*later.items(), ("embedding_norm", names[0])):
            if key.startswith(f"decoder.{own}."):
                weights[key] = model.state_dict()[key.replace(own, source)]
    other.load_state_dict({key: weights[key] for key in other.state_dict()})
    tokens, positions = torch.randint(256, (2, 6)), torch.arange(6).expand(2, 2, 6)
    torch.testing.assert_close(other.decode(tokens, positions, masks.causal),
                               model.decode(tokens, positions, masks.causal), atol=1e-5, rtol=0)


# ---- learning ----------------------------------------------------------------------------------------------

def test_the_embeddings_gradient_shrinks_and_nothing_else(batch_of):
    """GLM-130B: a tenth of the gradient reaches the embedding; values and other gradients stay."""
    batch, gradients, logits = batch_of("prefix", "packed"), [], []
    for share in (1.0, 0.1):
        torch.manual_seed(0)
        model = randomised(small("glm-130b", tied=False, embedding_gradient=share)).requires_grad_(True)
        logits.append(outputs(model, batch))
        logits[-1].logsumexp(-1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*logits)
    for name, full in gradients[0].items():
        share = 0.1 if name == "embedding.weight" else 1.0
        torch.testing.assert_close(gradients[1][name], share * full, atol=1e-4, rtol=1e-3)


@families
def test_the_first_loss_is_about_ln_v(name, batch_of, tokenizer):
    """Its mean over all possible targets is, and every weight of the network is in its sight. Not so PaLM's loss:
    its tied embedding of unit variance makes a network of few layers predict the token that it has just read.
    """
    model = networks.build(small(name, vocab=tokenizer.vocab, width=96, head_width=16))
    structure = model.config.structure
    batch = batch_of(structure, "packed")
    logits = model(batch, masks.of_batch(structure, batch), batch.loss_mask)
    loss = objectives.language_model_loss(logits, batch.targets[batch.loss_mask]) / batch.loss_mask.sum()
    over_all_targets = (logits.logsumexp(-1) - logits.mean(-1)).mean().item()       # never below ln V
    above = over_all_targets - math.log(tokenizer.vocab)
    assert above > 1 if "palm" in name else -1e-5 < above < 1                       # logits of variance 1: 1/2
    loss.backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_initial_weights_are_the_published_ones():
    """Standard deviations: GPT-2's residual projections, T5's queries, DeepNorm's values and feed-forward."""
    sizes = dict(layers=8, width=128, heads=4, kv_heads=4)
    gpt, t5, glm = (networks.build(preset(name, vocab=300, **sizes)).state_dict()
                    for name in ("gpt2", "t5-base", "glm-130b"))
    H, D = 4 * 32, 128
    q, k, v = glm["decoder.blocks.0.attention.qkv.weight"].split(D)
    F = glm["decoder.blocks.0.ffn.out.weight"].shape[1]
    expected = [
        (gpt["embedding.weight"], 0.02), (gpt["decoder.blocks.1.ffn.inner.weight"], 0.02),
        (gpt["decoder.blocks.1.ffn.out.weight"], 0.02 / 4),
        (gpt["decoder.blocks.1.attention.out.weight"], 0.02 / 4),
        (t5["embedding.weight"], 1.0), (t5["decoder.blocks.0.ffn.out.weight"], 512 ** -0.5),
        (t5["decoder.blocks.0.cross.qkv.weight"][:H], (D * 32) ** -0.5),
        (t5["decoder.blocks.0.attention.qkv.weight"][H:], D ** -0.5),
        (t5["encoder.relative.weight"], D ** -0.5),
        (q, (1 / D) ** 0.5), (k, (1 / D) ** 0.5), (v, (1 / D) ** 0.5 / 4),
        (glm["decoder.blocks.0.ffn.inner.weight"], (2 / (D + F)) ** 0.5 / 4),
        (glm["decoder.blocks.0.ffn.out.weight"], (2 / (D + F)) ** 0.5 / 4)]
    for weight, std in expected:
        assert weight.std().item() == pytest.approx(std, rel=0.12 if weight.numel() < 1000 else 0.03)
    assert all(not w.any() for name, w in [*gpt.items(), *glm.items()] if name.endswith("bias"))


def test_tied_weights_are_counted_and_stored_once():
    model = networks.build(small("gpt2"))
    assert "unembedding.weight" not in model.state_dict()
    assert sum(p.shape == model.embedding.weight.shape for p in model.parameters()) == 1

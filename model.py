"""The networks: a decoder (causal and prefix are one network under two masks) and an encoder-decoder.

Read it from top to bottom: attention written out, the routes that compute the same faster, the parts (norms,
attention, feed-forward; positions.py has the positions), the block, the two stacks, and the two heads:
next-token logits for the language model, one scalar per token for reward and value models. The parts have a
few named variants, and every published family is a choice among them (presets.py). Nothing here knows a loss
or an optimizer. Dropout, which some of the families were trained with, is left out.

Letters in names: B batch, T query length, S key length, D width, H heads, G key/value heads, K head width,
V vocabulary, F feed-forward width. `x_BTD` has shape (B, T, D).
"""
import functools
import math
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import masks as masks_module
from masks import Masks
from positions import Alibi, Biased, RelativeBias, rotate, rotation, with_bias
from presets import ModelConfig, preset, preset_for                 # noqa: F401 (used from here)

# ---- attention: the text, and the routes that compute the same ---------------------------------------------

def written_out_attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, allowed_BHTS: Tensor,
                          scale: float | None = None, bias_BHTS: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the allowed keys (Vaswani et al. 2017, eq. 1). allowed: bool, may
    broadcast. scale replaces 1 / sqrt(K); bias is added to the scores: relative positions.
    """
    scores_BHTS = q_BHTK @ k_BHSK.transpose(-2, -1)
    scores_BHTS = scores_BHTS / math.sqrt(q_BHTK.shape[-1]) if scale is None else scores_BHTS * scale
    scores_BHTS = scores_BHTS if bias_BHTS is None else scores_BHTS + bias_BHTS
    scores_BHTS = scores_BHTS.masked_fill(~allowed_BHTS, float("-inf"))
    weights_BHTS = torch.softmax(scores_BHTS.float(), dim=-1).to(v_BHSK.dtype)
    return weights_BHTS @ v_BHSK


def attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask, scale: float | None = None) -> Tensor:
    """The same by the fastest route that there is, mostly a fused kernel. Returns (B, H, T, K).

    mask: the predicate masks.causal itself (no tensor needed); a tensor that broadcasts to (B, H, T, S), bool
    or added to the scores, -inf where attention is forbidden; FlexAttention's BlockMask; or a Biased one.
    Each group of H / G query heads shares one key/value head (Ainslie et al. 2023).
    """
    if not isinstance(mask, Tensor) and mask is not masks_module.causal:
        return flex(q_BHTK, k_BGSK, v_BGSK, mask, scale)
    if isinstance(mask, Tensor) and mask.is_floating_point():
        mask = mask.to(q_BHTK.dtype)
    groups = q_BHTK.shape[1] // k_BGSK.shape[1]
    on_cpu, short = q_BHTK.device.type == "cpu", k_BGSK.shape[2] <= 1024
    by_hand = on_cpu and short and q_BHTK.dtype == torch.bfloat16
    kernel = (bf16_on_a_cpu if by_hand else masked_on_a_gpu if q_BHTK.is_cuda and isinstance(mask, Tensor)
              else F.scaled_dot_product_attention)
    if groups > 1 and q_BHTK.shape[2] == 1 and isinstance(mask, Tensor) and mask.shape[1] == 1:
        # decoding: the heads of a group become the queries of one head, and the cache need not be repeated
        queries = q_BHTK.unflatten(1, (-1, groups)).squeeze(3)
        heads = kernel(queries, k_BGSK, v_BGSK, attn_mask=mask, scale=scale)
        return heads.flatten(1, 2).unsqueeze(2)
    k_BHSK, v_BHSK = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k_BGSK, v_BGSK))
    if mask is not masks_module.causal:
        return kernel(q_BHTK, k_BHSK, v_BHSK, attn_mask=mask, scale=scale)
    if not q_BHTK.is_cuda:
        return kernel(q_BHTK, k_BHSK, v_BHSK, is_causal=True, scale=scale)
    from torch.nn.attention import SDPBackend, sdpa_kernel
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
             SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, is_causal=True, scale=scale)


def masked_on_a_gpu(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, attn_mask: Tensor,
                    scale: float | None = None) -> Tensor:
    """Without cuDNN, which is planned anew for every size: in decoding, at every token."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=attn_mask, scale=scale)


def bf16_on_a_cpu(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, attn_mask: Tensor | None = None,
                  is_causal: bool = False, scale: float | None = None) -> Tensor:
    """written_out_attention with an additive mask, all of it in bf16: products gain from that on a CPU, the
    fused kernel loses (24 rows of 48 tokens take it six times as long). Every query must see some key.
    """
    T, S = q_BHTK.shape[2], k_BHSK.shape[2]
    allowed = masks_module.dense(masks_module.causal, 1, T, S) if is_causal else attn_mask
    if allowed.dtype == torch.bool:
        allowed = torch.zeros_like(allowed, dtype=q_BHTK.dtype).masked_fill(~allowed, float("-inf"))
    scale = q_BHTK.shape[-1] ** -0.5 if scale is None else scale
    scores_BHTS = (q_BHTK * scale) @ k_BHSK.transpose(-2, -1) + allowed
    return torch.softmax(scores_BHTS, dim=-1) @ v_BHSK


def few_sizes(n: int) -> int:
    """n rounded up to seven significant binary digits: at most a 64th more. A CPU's kernels for bf16 (oneDNN)
    are made anew for every size, which takes several times as long as a product of that size.
    """
    unit = 2 ** max(0, n.bit_length() - 7)
    return -(-n // unit) * unit


def flex(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask, scale: float | None = None) -> Tensor:
    """FlexAttention: a fused kernel generated for the predicate and the bias; uncompiled on a CPU, where it
    serves the tests. It takes no heads narrower than 16: zeros fill them up, and add nothing to a score.
    """
    from torch.nn.attention.flex_attention import flex_attention
    kernel = _compiled_flex() if q_BHTK.is_cuda else flex_attention
    block_mask, bias = mask if isinstance(mask, Biased) else (mask, None)
    add_bias = bias and (lambda score, b, h, q, k: score + bias(b, h, q, k))
    K, grouped = q_BHTK.shape[-1], q_BHTK.shape[1] != k_BGSK.shape[1]
    qkv, scale = (q_BHTK, k_BGSK, v_BGSK), K ** -0.5 if scale is None else scale
    q, k, v = (F.pad(x, (0, 16 - K)) for x in qkv) if K < 16 else qkv
    ordinary = {"BACKEND": "TRITON"}     # torch 2.11 cannot compile its kernel for few queries for any sizes
    return kernel(q, k, v, add_bias, block_mask, scale, grouped, kernel_options=ordinary)[..., :K]


@functools.cache
def _compiled_flex() -> Callable:
    """torch.compile(flex_attention), once per process, for any sizes: one kernel for each kind of mask. An
    encoder-decoder's training and evaluation have a dozen (torch's default is to give up after 8).
    """
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=True)


# ---- the parts: norms --------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019, eq. 4): no mean is subtracted, no bias added."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def norm_of(config: ModelConfig) -> nn.Module:
    """RMSNorm, or (x - mean(x)) / std(x) * weight [+ bias] (Ba et al. 2016, eq. 4)."""
    if config.norm == "rms":
        return RMSNorm(config.width, config.norm_eps)
    return nn.LayerNorm(config.width, config.norm_eps, bias=config.norm_bias)


# ---- the parts: attention and feed-forward -----------------------------------------------------------------

class KVCache:
    """Keys and values of the tokens read so far: (B, G, S, K) per layer, the first `length` of S filled."""

    def __init__(self, config: ModelConfig, B: int, S: int, device, dtype=torch.float32):
        shape = (config.layers, B, config.kv_heads, S, config.head_width)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.positions = torch.zeros((B, S), device=device, dtype=torch.long)      # for relative positions
        self.length = 0
        self.cross: list = [None] * config.layers     # keys and values of the encoder's output, computed once

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values; returns those of all so far. The model advances `length`."""
        end = self.length + k_BGTK.shape[2]
        if end > self.k.shape[3]:
            raise ValueError(f"the cache holds {self.k.shape[3]} tokens; {end} were asked for")
        self.k[layer][:, :, self.length:end], self.v[layer][:, :, self.length:end] = k_BGTK, v_BGTK
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def append_positions(self, positions_BT: Tensor) -> Tensor:
        """Store the new tokens' positions; returns those of all tokens so far."""
        end = self.length + positions_BT.shape[1]
        self.positions[:, self.length:end] = positions_BT
        return self.positions[:, :end]

    def keep(self, rows: Tensor) -> None:
        """Forget all rows of the batch but these."""
        self.k, self.v, self.positions = self.k[:, rows], self.v[:, rows], self.positions[rows]
        self.cross = [pair and (pair[0][rows], pair[1][rows]) for pair in self.cross]


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values: over the tokens themselves, or across, over the
    encoder's output.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.H, self.G, self.K = config.heads, config.kv_heads, config.head_width
        self.scale = None if config.scaled_attention else 1.0
        self.qkv = nn.Linear(config.width, (self.H + 2 * self.G) * self.K, bias=config.bias != "none")
        self.out = nn.Linear(self.H * self.K, config.width, bias=config.bias == "all")

    def heads(self, x_BTE: Tensor) -> Tensor:
        """(B, T, n K) -> (B, n, T, K) for any number n of heads"""
        return x_BTE.unflatten(-1, (-1, self.K)).transpose(1, 2)

    def forward(self, x_BTD: Tensor, mask, angles=None, cache=None, layer: int = 0) -> Tensor:
        """Self-attention: positions rotate queries and keys; keys and values go into the cache."""
        qk, v = self.heads(self.qkv(x_BTD)).split((self.H + self.G, self.G), dim=1)
        qk = rotate(qk, *angles) if angles else qk
        q, k = qk.split((self.H, self.G), dim=1)
        if cache:
            k, v = (x.to(q.dtype) for x in cache.append(layer, k, v))
        return self.joined(attention(q, k, v, mask, self.scale))

    def rows(self, x_BTD: Tensor, start: int, end: int | None) -> Tensor:
        """The heads that these rows of the joint projection make."""
        bias = None if self.qkv.bias is None else self.qkv.bias[start:end]
        return self.heads(F.linear(x_BTD, self.qkv.weight[start:end], bias))

    def keys_values(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's output as keys and values, (B, G, S, K) each: the same for every target token."""
        return self.rows(memory_BSD, self.H * self.K, None).chunk(2, dim=1)

    def across(self, x_BTD: Tensor, keys_values: tuple[Tensor, Tensor], mask) -> Tensor:
        """Cross-attention: queries from the target, keys and values from the source; no positions."""
        q = self.rows(x_BTD, 0, self.H * self.K)
        return self.joined(attention(q, *keys_values, mask, self.scale))

    def joined(self, y_BHTK: Tensor) -> Tensor:
        return self.out(y_BHTK.transpose(1, 2).flatten(2))


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}
GATES = {"geglu": F.gelu, "geglu_tanh": ACTIVATIONS["gelu_tanh"], "swiglu": F.silu}


class FeedForward(nn.Module):
    """W_out act(W_in x), or with a gate W_out (act(W_gate x) * W_up x) (Shazeer 2020, eq. 5 and 6)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate, self.activation = GATES.get(config.ffn), ACTIVATIONS.get(config.ffn)
        inner_width = 2 * config.ffn_width if self.gate else config.ffn_width
        self.inner = nn.Linear(config.width, inner_width, bias=config.bias == "all")
        self.out = nn.Linear(config.ffn_width, config.width, bias=config.bias == "all")

    def forward(self, x: Tensor) -> Tensor:
        if not self.gate:
            return self.out(self.activation(self.inner(x)))
        gate, up = self.inner(x).chunk(2, dim=-1)
        return self.out(self.gate(gate) * up)


# ---- the block and the stack -------------------------------------------------------------------------------

class Block(nn.Module):
    """Attention [, cross-attention] and feed-forward f, each added to the residual stream x. norm_place:

        pre              x + f(norm(x))                Radford et al. 2019, and most since
        post             norm(x + f(x))                Vaswani et al. 2017, section 3.1
        deepnorm         norm(alpha x + f(x))          Wang et al. 2022a; for N layers their alpha is
                                                       (2N)^(1/4), and (2N)^(1/2), as here, GLM-130B's
        normed_residual  alpha norm(x) + f(norm(x))    ChatGLM-6B: deepnorm, begun one norm earlier

    A parallel block is x + attention(norm(x)) + ffn(norm(x)), with one norm for both or one for each.
    """

    def __init__(self, config: ModelConfig, layer: int, cross: bool = False):
        super().__init__()
        self.layer, self.norm_place, self.parallel = layer, config.norm_place, config.block != "serial"
        self.alpha = 1.0 if config.norm_place == "post" else math.sqrt(2 * config.layers)
        self.attention_norm, self.attention = norm_of(config), Attention(config)
        self.cross_norm = norm_of(config) if cross else None
        self.cross = Attention(config) if cross else None
        self.ffn_norm = None if config.block == "parallel" else norm_of(config)
        self.ffn = FeedForward(config)

    def add(self, x: Tensor, norm: nn.Module, f: Callable, *context) -> Tensor:
        if self.norm_place == "pre":
            return x + f(norm(x), *context)
        if self.norm_place == "normed_residual":
            x = norm(x)
            return self.alpha * x + f(x, *context)
        return norm(self.alpha * x + f(x, *context))

    def forward(self, x: Tensor, mask, angles=None, memory=None, cross_mask=None, cache=None) -> Tensor:
        if self.parallel:
            y = self.attention_norm(x)
            z = self.ffn_norm(x) if self.ffn_norm else y
            return x + self.attention(y, mask, angles, cache, self.layer) + self.ffn(z)
        x = self.add(x, self.attention_norm, self.attention, mask, angles, cache, self.layer)
        if self.cross:
            keys_values = cache.cross[self.layer] if cache else None
            keys_values = keys_values or self.cross.keys_values(memory)
            if cache:
                cache.cross[self.layer] = keys_values
            x = self.add(x, self.cross_norm, self.cross.across, keys_values, cross_mask)
        return self.add(x, self.ffn_norm, self.ffn)


class Stack(nn.Module):
    """Positions, blocks, and the final norm. The encoder is one of these, the decoder another."""

    def __init__(self, config: ModelConfig, cross: bool = False, bidirectional: bool = False):
        super().__init__()
        self.config, kind = config, config.positions
        rows = config.max_positions + config.position_offset
        self.positions = nn.Embedding(rows, config.width) if kind == "learned" else None
        self.relative = (RelativeBias(config, bidirectional) if kind == "relative" else
                         Alibi(config) if kind == "alibi" else None)
        self.embedding_norm = norm_of(config) if config.embedding_norm else None
        self.blocks = nn.ModuleList(Block(config, layer, cross) for layer in range(config.layers))
        self.norm = norm_of(config) if config.final_norm else None

    def forward(self, x: Tensor, positions: Tensor, mask, memory=None, cross_mask=None, cache=None) -> Tensor:
        """positions: (B, T); rope2d (2, B, T)."""
        if self.positions:
            x = x + self.positions(positions + self.config.position_offset)
        if self.embedding_norm:
            x = self.embedding_norm(x)
        if self.relative:
            B, T = positions.shape
            of_keys = cache.append_positions(positions) if cache else positions
            bias = self.relative(positions, of_keys)
            mask = with_bias(mask, bias, B, self.config.heads, T, of_keys.shape[1], x.device)
        angles = rotation(positions, self.config)
        for block in self.blocks:
            x = block(x, mask, angles, memory, cross_mask, cache)
        if cache:
            cache.length += x.shape[1]
        return self.norm(x) if self.norm else x


# ---- the structures ----------------------------------------------------------------------------------------

class LanguageModel(nn.Module):
    """Tokens -> next-token logits. What Decoder and EncoderDecoder share: embedding and unembedding."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.decoder = Stack(config, config.structure == "encdec", bidirectional=config.structure == "prefix")
        self.unembedding = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)

    def forward(self, batch, masks: Masks, where_BT: Tensor) -> Tensor:
        """Logits (N, V) of the next token, at the N positions where `where` is True, row by row.

        Nothing else of the logits is ever needed, and they are a third of the work at the default sizes.
        """
        hidden_ND = self.hidden(batch, masks)[where_BT]
        in_bf16 = hidden_ND.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        if not in_bf16 or torch.compiler.is_compiling():
            return self.logits(hidden_ND)
        n = len(hidden_ND)
        return self.logits(F.pad(hidden_ND, (0, 0, 0, few_sizes(n) - n)))[:n]

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """The tokens' vectors, and a share a = embedding_gradient of their gradient: what kept GLM-130B from
        most of its spikes (Zeng et al. 2023, section 3).
        """
        x_BTD, a = self.embedding(tokens_BT), self.config.embedding_gradient
        return x_BTD if a == 1 else a * x_BTD + (1 - a) * x_BTD.detach()

    def decode(self, tokens_BT: Tensor, positions: Tensor, mask, memory_BSD: Tensor | None = None,
               cross_mask=None, cache: KVCache | None = None) -> Tensor:
        """The decoder's last layer (B, T, D). memory: what the encoder has read; cross_mask: who sees it."""
        return self.decoder(self.embed(tokens_BT), positions, mask, memory_BSD, cross_mask, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        logits = F.linear(hidden, (self.unembedding or self.embedding).weight)
        return logits * self.config.width ** -0.5 if self.config.scaled_logits else logits

    @torch.no_grad()
    def initialise(self) -> "LanguageModel":
        """Draw matrices from N(0, std^2), by torch's global generator; biases start at zero, norms at one."""
        H, G, K = self.config.heads, self.config.kv_heads, self.config.head_width
        if self.embedding.weight.is_meta:
            return self                                        # shapes without values: nothing to draw
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = initial_std(name, parameter.shape, self.config)
                nn.init.normal_(parameter, std=std) if std else nn.init.zeros_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            if name.endswith("qkv.weight") and not self.config.scaled_attention:
                parameter[:H * K] *= K ** -0.5                 # T5: in the first weights, not in the scores
            if name.endswith("qkv.weight") and self.config.init == "deepnorm":
                parameter[(H + G) * K:] *= (2 * self.config.layers) ** -0.5
        return self


def initial_std(name: str, shape: torch.Size, config: ModelConfig) -> float:
    """The standard deviation that a matrix starts with; N is the number of layers. config.init:

    fan_in    1 / fan_in is the variance; embeddings have variance 1 (T5's code; PaLM, section 5)
    zero      the same, but zeros for what is added to the residual stream and for the unembedding: every
              block (pre) is then the identity and the first loss (untied) exactly ln V; embeddings of unit
              variance let a small model leave the unigram plateau at once. (Tied: variance 1 / width.)
    normal    0.02; what is added to the residual stream / sqrt(2N) (Radford et al. 2019, section 2.3)
    deepnorm  Xavier; x beta = (2N)^(-1/2) for ffn, values and attention's output (Zeng et al. 2023, 2.1)
    """
    residual, beta = name.endswith("out.weight"), (2 * config.layers) ** -0.5
    is_table = name.startswith(("embedding", "unembedding")) or "positions" in name
    if config.init == "normal" or (config.init == "deepnorm" and is_table):
        return 0.02 * beta if residual else 0.02
    if config.init == "deepnorm":
        side_by_side = 3 if "qkv" in name else 2 if "inner" in name and config.ffn in GATES else 1
        xavier = math.sqrt(2 / (shape[1] + shape[0] / side_by_side))
        return xavier if "qkv" in name else beta * xavier
    if config.init == "zero" and (residual or name == "unembedding.weight"):
        return 0.0
    if name == "embedding.weight" and (config.scaled_logits or not config.tied):
        return 1.0
    return (config.width if name.endswith("relative.weight") else shape[1]) ** -0.5


class Decoder(LanguageModel):
    """Source and target in one row. Causal or prefix is decided by the mask alone (and by T5's buckets of
    distances, where it has them).
    """

    def hidden(self, batch, masks: Masks) -> Tensor:
        """The last layer's output (B, T, D)."""
        positions = batch.positions_2d if self.config.positions == "rope2d" else batch.positions
        return self.decode(batch.tokens, positions, masks.attention)


class EncoderDecoder(LanguageModel):
    """A bidirectional encoder reads the source; the target's causal decoder sees it by cross-attention."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.encoder = Stack(config, bidirectional=True)

    def hidden(self, batch, masks: Masks) -> Tensor:
        """The decoder's last layer (B, T, D)."""
        memory_BSD = self.encode(batch.source, batch.source_positions, masks.encoder)
        return self.decode(batch.tokens, batch.positions, masks.attention, memory_BSD, masks.cross)

    def encode(self, source_BS: Tensor, positions_BS: Tensor, mask) -> Tensor:
        return self.encoder(self.embed(source_BS), positions_BS, mask)


def build(config: ModelConfig) -> LanguageModel:
    """A freshly initialised network of the given structure and sizes."""
    return (EncoderDecoder if config.structure == "encdec" else Decoder)(config).initialise()


class ScalarModel(nn.Module):
    """One scalar per token: the reward model (read at the last token) and the value model (read at every
    token).

    The unembedding is replaced by a vector, drawn near zero as in Stiennon et al. 2020 (appendix B.1). `mean`
    and `std` make the output comparable: the score is (raw - mean) / std, set once after the reward model is
    trained.
    """

    def __init__(self, trunk: LanguageModel):
        super().__init__()
        self.config, self.trunk = trunk.config, trunk
        self.trunk.unembedding = None
        self.head = nn.Linear(self.config.width, 1)
        nn.init.normal_(self.head.weight, std=(self.config.width + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, batch, masks: Masks, where_BT: Tensor) -> Tensor:
        """Scores (N,), fp32, at the N positions where `where` is True, row by row."""
        raw_N = self.head(self.trunk.hidden(batch, masks)).squeeze(-1)[where_BT].float()
        return (raw_N - self.mean) / self.std


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())

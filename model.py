"""The networks: a decoder (causal and prefix are one network under two masks) and an encoder-decoder.

Read it from top to bottom: attention written out, the routes that compute the same faster, the parts
(RMSNorm, rotary positions, grouped-query attention, SwiGLU), the block, the two stacks, and the two heads:
next-token logits for the language model, one scalar per token for reward and value models. Nothing here knows
a loss or an optimizer.

Letters in names: B batch, T query length, S key length, D width, H heads, G key/value heads, K head width,
V vocabulary, F feed-forward width. `x_BTD` has shape (B, T, D).
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import masks as masks_module
from errors import UserError
from masks import Masks

STRUCTURES = ("causal", "prefix", "encdec")


@dataclass
class ModelConfig:
    """Sizes of a network. encdec has `layers` layers in the encoder and as many in the decoder."""
    structure: str = "causal"
    vocab: int = 2048
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2             # grouped-query attention: `heads` share this many keys and values
    width: int = 128
    ffn_width: int = 0            # 0: 8/3 of the width, rounded up to a multiple of 32
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.structure not in STRUCTURES:
            raise UserError(f"structure is {self.structure!r}; it must be one of {', '.join(STRUCTURES)}")
        for name in ("vocab", "layers", "heads", "kv_heads", "width"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise UserError(f"heads {self.heads} must divide width {self.width} into heads of an even width")
        if self.heads % self.kv_heads:
            raise UserError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        if self.ffn_width < 0:
            raise UserError(f"ffn_width is {self.ffn_width}; it must not be negative")
        self.ffn_width = self.ffn_width or 32 * math.ceil(8 * self.width / 3 / 32)

    @property
    def head_width(self) -> int:
        return self.width // self.heads


# ---- attention: the text, and the routes that compute the same ---------------------------------------------

def written_out_attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, allowed_BHTS: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the allowed keys (Vaswani et al. 2017, eq. 1). allowed: bool, may
    broadcast.
    """
    scores_BHTS = q_BHTK @ k_BHSK.transpose(-2, -1) / math.sqrt(q_BHTK.shape[-1])
    scores_BHTS = scores_BHTS.masked_fill(~allowed_BHTS, float("-inf"))
    weights_BHTS = torch.softmax(scores_BHTS.float(), dim=-1).to(v_BHSK.dtype)
    return weights_BHTS @ v_BHSK


def attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask) -> Tensor:
    """The same by a fused kernel. Returns (B, H, T, K).

    mask: the predicate masks.causal itself (no tensor needed), a bool tensor that broadcasts to (B, H, T, S),
    or a FlexAttention BlockMask. Each group of H / G query heads shares one key/value head (Ainslie et al.
    2023).
    """
    if not isinstance(mask, Tensor) and mask is not masks_module.causal:
        return flex(q_BHTK, k_BGSK, v_BGSK, mask)
    groups = q_BHTK.shape[1] // k_BGSK.shape[1]
    if groups > 1 and q_BHTK.shape[2] == 1 and isinstance(mask, Tensor) and mask.shape[1] == 1:
        # decoding: the heads of a group become the queries of one head, and the cache need not be repeated
        queries = q_BHTK.unflatten(1, (-1, groups)).squeeze(3)
        heads = F.scaled_dot_product_attention(queries, k_BGSK, v_BGSK, attn_mask=mask)
        return heads.flatten(1, 2).unsqueeze(2)
    k_BHSK, v_BHSK = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k_BGSK, v_BGSK))
    if mask is not masks_module.causal:
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=mask)
    if not q_BHTK.is_cuda:
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, is_causal=True)
    from torch.nn.attention import SDPBackend, sdpa_kernel
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
             SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, is_causal=True)


def flex(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, block_mask) -> Tensor:
    """FlexAttention: a fused kernel generated for the predicate; uncompiled on a CPU, where it serves the
    tests.
    """
    from torch.nn.attention.flex_attention import flex_attention
    kernel = _compiled_flex() if q_BHTK.is_cuda else flex_attention
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    return kernel(q_BHTK, k_BGSK, v_BGSK, block_mask=block_mask, enable_gqa=grouped)


def _compiled_flex(compiled: list = []):
    """torch.compile(flex_attention), once per process."""
    if not compiled:
        from torch.nn.attention.flex_attention import flex_attention
        compiled.append(torch.compile(flex_attention, dynamic=True))
    return compiled[0]


# ---- the parts ---------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019, eq. 4): no mean is subtracted, no bias added."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_angles(positions_BT: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position x theta^(-2i/K) for i < K/2 (Su et al. 2021, eq. 15). Each (B, 1, T, K/2),
    fp32.
    """
    frequency = theta ** (-torch.arange(0, head_width, 2, device=positions_BT.device).float() / head_width)
    angle = positions_BT[:, None, :, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i+K/2}) by their angles, so that q . k depends on the distance alone."""
    first, second = x_BHTK.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BHTK.dtype)


class KVCache:
    """Keys and values of the tokens read so far: preallocated (B, G, S, K) per layer, `length` of S
    filled.
    """

    def __init__(self, config: ModelConfig, B: int, S: int, device, dtype=torch.float32):
        shape = (config.layers, B, config.kv_heads, S, config.head_width)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.cross: list = [None] * config.layers     # keys and values of the encoder's output, computed once

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values; returns those of all tokens so far. The model advances
        `length`.
        """
        end = self.length + k_BGTK.shape[2]
        if end > self.k.shape[3]:
            raise ValueError(f"the cache holds {self.k.shape[3]} tokens; {end} were asked for")
        self.k[layer][:, :, self.length:end], self.v[layer][:, :, self.length:end] = k_BGTK, v_BGTK
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Forget all rows of the batch but these."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.cross = [pair and (pair[0][rows], pair[1][rows]) for pair in self.cross]


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values: over the tokens themselves, or across, over the
    encoder's output.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.H, self.G, self.K = config.heads, config.kv_heads, config.head_width
        self.qkv = nn.Linear(config.width, (self.H + 2 * self.G) * self.K, bias=False)
        self.out = nn.Linear(self.H * self.K, config.width, bias=False)

    def heads(self, x_BTE: Tensor) -> Tensor:
        """(B, T, n K) -> (B, n, T, K) for any number n of heads"""
        return x_BTE.unflatten(-1, (-1, self.K)).transpose(1, 2)

    def forward(self, x_BTD: Tensor, mask, angles, cache=None, layer: int = 0) -> Tensor:
        """Self-attention: queries and keys are rotated by their positions, keys and values go into the
        cache.
        """
        qk, v = self.heads(self.qkv(x_BTD)).split((self.H + self.G, self.G), dim=1)
        q, k = rotate(qk, *angles).split((self.H, self.G), dim=1)
        if cache:
            k, v = (x.to(q.dtype) for x in cache.append(layer, k, v))
        return self.joined(attention(q, k, v, mask))

    def keys_values(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's output as keys and values, (B, G, S, K) each: the same for every target token."""
        weight = self.qkv.weight[self.H * self.K:]
        return self.heads(F.linear(memory_BSD, weight)).chunk(2, dim=1)

    def across(self, x_BTD: Tensor, keys_values: tuple[Tensor, Tensor], mask) -> Tensor:
        """Cross-attention: queries from the target, keys and values from the source; no positions."""
        q = self.heads(F.linear(x_BTD, self.qkv.weight[:self.H * self.K]))
        return self.joined(attention(q, *keys_values, mask))

    def joined(self, y_BHTK: Tensor) -> Tensor:
        return self.out(y_BHTK.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """W_out (silu(W_gate x) * W_up x) (Shazeer 2020, eq. 6)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.ffn_width, bias=False)
        self.out = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), [x + cross-attention(norm(x)),] x +
    feed-forward(norm(x)).
    """

    def __init__(self, config: ModelConfig, layer: int, cross: bool = False):
        super().__init__()
        self.layer = layer
        self.attention_norm, self.attention = RMSNorm(config.width, config.norm_eps), Attention(config)
        self.cross_norm = RMSNorm(config.width, config.norm_eps) if cross else None
        self.cross = Attention(config) if cross else None
        self.ffn_norm, self.ffn = RMSNorm(config.width, config.norm_eps), SwiGLU(config)

    def forward(self, x: Tensor, mask, angles, memory=None, cross_mask=None, cache=None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask, angles, cache, self.layer)
        if self.cross:
            keys_values = cache.cross[self.layer] if cache else None
            keys_values = keys_values or self.cross.keys_values(memory)
            if cache:
                cache.cross[self.layer] = keys_values
            x = x + self.cross.across(self.cross_norm(x), keys_values, cross_mask)
        return x + self.ffn(self.ffn_norm(x))


class Stack(nn.Module):
    """Blocks and the final norm. The encoder is one of these, the decoder another."""

    def __init__(self, config: ModelConfig, cross: bool = False):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, layer, cross) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, positions: Tensor, mask, memory=None, cross_mask=None, cache=None) -> Tensor:
        angles = rotary_angles(positions, self.config.head_width, self.config.rope_theta)
        for block in self.blocks:
            x = block(x, mask, angles, memory, cross_mask, cache)
        if cache:
            cache.length += x.shape[1]
        return self.norm(x)


# ---- the structures ----------------------------------------------------------------------------------------

class LanguageModel(nn.Module):
    """Tokens -> next-token logits. What Decoder and EncoderDecoder share: embedding and unembedding."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.decoder = Stack(config, cross=config.structure == "encdec")
        self.unembedding = nn.Linear(config.width, config.vocab, bias=False)

    def forward(self, batch, masks: Masks, where_BT: Tensor) -> Tensor:
        """Logits (N, V) of the next token, at the N positions where `where` is True, row by row.

        Nothing else of the logits is ever needed, and for short answers to long prompts they are half of the
        work.
        """
        return self.unembedding(self.hidden(batch, masks)[where_BT])

    def initialise(self) -> "LanguageModel":
        """Matrices N(0, 1/fan_in); whatever is added to the residual stream, and the unembedding, start at
        zero.

        Every block is then the identity and the first loss is exactly ln V; embeddings of unit variance let a
        small model leave the unigram plateau at once. Draws from torch's global generator.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "unembedding.weight")):
                nn.init.zeros_(parameter)
            elif name == "embedding.weight":
                nn.init.normal_(parameter, std=1.0)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        return self


class Decoder(LanguageModel):
    """Source and target in one row. Causal or prefix is decided by the mask alone."""

    def hidden(self, batch, masks: Masks) -> Tensor:
        """The last layer's output (B, T, D)."""
        return self.decode(batch.tokens, batch.positions, masks.attention)

    def decode(self, tokens_BT: Tensor, positions_BT: Tensor, mask, cache: KVCache | None = None) -> Tensor:
        return self.decoder(self.embedding(tokens_BT), positions_BT, mask, cache=cache)


class EncoderDecoder(LanguageModel):
    """The source is read by a bidirectional encoder; the target's causal decoder looks at it by
    cross-attention.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.encoder = Stack(config)

    def hidden(self, batch, masks: Masks) -> Tensor:
        """The decoder's last layer (B, T, D)."""
        memory_BSD = self.encode(batch.source, batch.source_positions, masks.encoder)
        return self.decode(batch.tokens, batch.positions, masks.attention, memory_BSD, masks.cross)

    def encode(self, source_BS: Tensor, positions_BS: Tensor, mask) -> Tensor:
        return self.encoder(self.embedding(source_BS), positions_BS, mask)

    def decode(self, tokens_BT: Tensor, positions_BT: Tensor, mask, memory_BSD: Tensor, cross_mask,
               cache: KVCache | None = None) -> Tensor:
        return self.decoder(self.embedding(tokens_BT), positions_BT, mask, memory_BSD, cross_mask, cache)


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
        raw_N = self.head(self.trunk.hidden(batch, masks)[where_BT]).squeeze(-1).float()
        return (raw_N - self.mean) / self.std


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())

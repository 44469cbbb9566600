"""Where a token stands: rotations of queries and keys, and biases on their scores.

Learned positions need nothing of this: model.Stack adds them to the embedding. All else is a function of the
positions of query and key, never of their place in the row, so that packing, padding and the cache leave it
alone. Letters as in model.py.
"""
import math
from typing import Any, Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import masks
from presets import ModelConfig

# ---- rotations ---------------------------------------------------------------------------------------------

def rotary_angles(positions_BT: Tensor, rotated_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position x theta^(-2i/K) for i < K/2 and K = rotated_width (Su et al. 2021, eq. 15).
    Each (B, 1, T, K/2), fp32.
    """
    pairs = torch.arange(0, rotated_width, 2, device=positions_BT.device)
    frequency = theta ** (-pairs.float() / rotated_width)
    angle = positions_BT[:, None, :, None].float() * frequency
    return angle.cos(), angle.sin()


def rotation(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, bool] | None:
    """(cos, sin, interleaved) for `rotate`. rope2d has positions (2, B, T), a token's index in the text and
    its index in the blank it fills (ChatGLM-6B): each turns one half of every head.
    """
    if config.positions == "rope":
        width = round(config.rope_share * config.head_width)
        return *rotary_angles(positions, width, config.rope_theta), config.rope_interleaved
    if config.positions == "rope2d":
        both = [rotary_angles(p_BT, config.head_width // 2, config.rope_theta) for p_BT in positions]
        cos, sin = (torch.stack(angles, dim=-2) for angles in zip(*both))           # (B, 1, T, 2, K/4)
        return cos, sin, False
    return None


def rotate(x_BHTK: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the pairs (x_i, x_{i+K/2}) by their angles, so that q . k depends on the distance alone.

    Interleaved, the pairs are (x_2i, x_2i+1). With angles for fewer than K/2 pairs, the rest of x passes.
    """
    x, two_halves, n = x_BHTK.float(), cos.dim() == 5, 2 * cos.shape[-1]
    x = x.unflatten(-1, (2, n)) if two_halves else x
    x, rest = (x[..., :n], x[..., n:]) if n < x.shape[-1] else (x, None)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    x = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    x = x if rest is None else torch.cat((x, rest), dim=-1)
    return (x.flatten(-2) if two_halves else x).to(x_BHTK.dtype)


# ---- biases ------------------------------------------------------------------------------------------------

BUCKETS, FARTHEST = 32, 128                     # T5's, in all sizes


def relative_bucket(distance: Tensor, bidirectional: bool) -> Tensor:
    """The bucket of a distance key - query (Raffel et al. 2020, section 2.1).

    Half of the buckets hold one distance each, the others ranges that widen as the logarithm does, the last
    all from FARTHEST on, and some before. Bidirectional: keys after the query have one half of the buckets,
    keys before it the other; else keys after it share bucket 0, as no causal mask lets them be seen.
    """
    n, first = BUCKETS, 0
    if bidirectional:
        n, first, distance = n // 2, n // 2 * (distance > 0), distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = n // 2
    growth = (distance.clamp(min=1) / exact).log() / math.log(FARTHEST / exact) * (n - exact)
    return first + torch.where(distance < exact, distance, (exact + growth.long()).clamp(max=n - 1))


class RelativeBias(nn.Module):
    """T5's positions: one learned number per head and bucket of distances, one table for a stack's layers."""

    def __init__(self, config: ModelConfig, bidirectional: bool):
        super().__init__()
        self.weight, self.bidirectional = nn.Parameter(torch.zeros(BUCKETS, config.heads)), bidirectional

    def forward(self, query_BT: Tensor, key_BS: Tensor) -> Tensor:
        """The biases (B, H, T, S) of queries and keys at these positions.

        A tensor, and no part of a fused kernel: in its backward pass every score would add to one of the same
        few numbers, one after another.
        """
        distance = torch.arange(-FARTHEST, FARTHEST + 1, device=query_BT.device)
        table = self.weight[relative_bucket(distance, self.bidirectional)]
        distance_BTS = (key_BS[:, None, :] - query_BT[:, :, None]).clamp(-FARTHEST, FARTHEST)
        return F.embedding(distance_BTS + FARTHEST, table).permute(0, 3, 1, 2).contiguous()


class Alibi(nn.Module):
    """ALiBi (Press et al. 2022): scores fall with the distance, by a slope of each head's own.

    H heads, a power of two, have the slopes 2^(-8/H), 2^(-16/H), ..., 2^-8. Otherwise the slopes of the power
    of two below H come first, then every other one of twice that power, as in the authors' code.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.H = config.heads

    def slopes(self, device) -> Tensor:
        h, power = torch.arange(1, self.H + 1, device=device), 2 ** (self.H.bit_length() - 1)
        return 2.0 ** -torch.where(h <= power, 8 * h / power, 4 * (2 * (h - power) - 1) / power)

    def forward(self, query_BT: Tensor, key_BS: Tensor) -> Callable:
        """bias(b, h, q, k) for tokens at these positions."""
        slopes = self.slopes(query_BT.device)
        return lambda b, h, q, k: -slopes[h] * (key_BS[b, k] - query_BT[b, q]).abs()


# ---- a bias joins the mask ---------------------------------------------------------------------------------

class Biased(NamedTuple):
    """A BlockMask, and the bias(b, h, q, k) that FlexAttention adds to the scores."""
    block_mask: Any
    bias: Callable


def with_bias(mask, bias: Tensor | Callable, B: int, H: int, T: int, S: int, device) -> Tensor | Biased:
    """Mask and bias in one, as `attention` takes them, made once for all layers of a stack.

    bias(b, h, q, k) is what head h adds to the score of query q and key k: like a predicate, it becomes a
    tensor or part of a fused kernel. One that is trained is a tensor already.
    """
    if mask is masks.causal:
        mask = masks.realise(mask, 1, T, S, device)
    if not isinstance(mask, Tensor):
        if not isinstance(bias, Tensor):
            return Biased(mask, bias)
        mask = masks.dense(masks.Predicate(mask.mask_mod), B, T, S, device)
    if not isinstance(bias, Tensor):
        b, h, q, k = (torch.arange(n, device=device) for n in (B, H, T, S))
        bias = bias(b[:, None, None, None], h[:, None, None], q[:, None], k)
    return bias.masked_fill(~mask, float("-inf"))

"""Sampling with the key/value cache, for all three structures and prompts of unequal length.

    python generate.py --run runs/ppo --prompt "def area(width, height):"
    python generate.py --run runs/sft --prompts functions.txt --temperature 0
"""
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

import masks
from data import Batch, Tokenizer
from model import KVCache, LanguageModel


def next_tokens(logits_BV: Tensor, temperature: float, top_k: int, top_p: float,
                generator: torch.Generator | None) -> Tensor:
    """Draw one token per row. temperature 0 takes the most likely one.

    top_k keeps the k most likely tokens (Fan et al. 2018), top_p the smallest set whose probability reaches p
    (nucleus sampling, Holtzman et al. 2020); 0 and 1 keep all.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        kth_BV = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_BV, float("-inf"))
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        before_BV = sorted_BV.softmax(-1).cumsum(-1) - sorted_BV.softmax(-1)     # probability of what is likelier
        dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(1, order_BV, before_BV >= top_p)
        logits_BV = logits_BV.masked_fill(dropped_BV, float("-inf"))
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(1)


def left_padded(rows: list[list[int]], pad: int, device) -> tuple[Tensor, Tensor]:
    """Tokens (B, P) with every row's end at the right edge, and the number of padding tokens (B,) before it."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    return tokens, torch.tensor([longest - len(row) for row in rows], device=device)


class Decoding:
    """A batch of prompts being continued: read() takes the next tokens in and gives the logits that follow them."""

    def __init__(self, model: LanguageModel, prompts: list[list[int]], max_new: int, tokenizer: Tokenizer):
        self.model, self.structure, device = model, model.config.structure, model.embedding.weight.device
        prompts = [[tokenizer.bos] + prompt for prompt in prompts]
        self.tokens, self.n_pad = left_padded(prompts, tokenizer.pad, device)
        self.memory, self.cross = None, None
        if self.structure == "encdec":
            self.encode()
            self.tokens = torch.full((len(prompts), 1), tokenizer.bos, device=device)
            self.n_pad = torch.zeros_like(self.n_pad)
        B, P = self.tokens.shape
        self.slots = torch.arange(P + max_new, device=device)
        self.cache = KVCache(model.config, B, P + max_new, device)

    def documents(self) -> tuple[Tensor, Tensor]:
        """(document, positions) of left-padded rows: -1 and 0 in the padding."""
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device) - self.n_pad[:, None]
        return torch.where(positions < 0, -1, 0), positions.clamp(min=0)

    def encode(self) -> None:
        """The encoder-decoder reads its prompt once; the decoder then starts from <bos>."""
        document, positions = self.documents()
        B, S = self.tokens.shape
        within = masks.same_document(document, document)
        self.memory = self.model.encode(self.tokens, positions, masks.dense(within, B, S, S, self.tokens.device))
        self.cross = masks.dense(masks.padding(document), B, 1, S, self.tokens.device)

    def read_prompt(self) -> Tensor:
        """Logits (B, V) after the prompt."""
        document, positions = self.documents()
        B, T = self.tokens.shape
        prompt = Batch(self.tokens, None, None, positions, document, torch.zeros_like(document), None)
        if self.structure == "encdec":
            prompt.source_document = document
        allowed = masks.predicates(self.structure, prompt).attention
        return self.logits(self.tokens, positions, masks.dense(allowed, B, T, T, self.tokens.device))

    def read(self, new_B: Tensor) -> Tensor:
        """Logits (B, V) after one more token per row."""
        at = self.cache.length
        allowed = (self.slots[:at + 1] >= self.n_pad[:, None])[:, None, None, :]
        return self.logits(new_B[:, None], (at - self.n_pad)[:, None], allowed)

    def logits(self, tokens_BT: Tensor, positions_BT: Tensor, mask) -> Tensor:
        cross = (self.memory, self.cross) if self.structure == "encdec" else ()
        hidden_BTD = self.model.decode(tokens_BT, positions_BT, mask, *cross, cache=self.cache)
        return self.model.unembedding(hidden_BTD[:, -1])


@torch.no_grad()
def generate(model: LanguageModel, prompts: list[list[int]], tokenizer: Tokenizer, max_new: int,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             generator: torch.Generator | None = None, batch_size: int = 256) -> list[list[int]]:
    """Continue every prompt until its end token, at most max_new tokens. Responses hold their end token, if they end.

    Prompts of similar length share a batch, so that little is padded. No special token but the end is ever drawn.
    """
    responses: list = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    never = [token for token in (tokenizer.pad, tokenizer.bos, *tokenizer.sentinels)]
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        decoding = Decoding(model, [prompts[i] for i in chosen], max_new, tokenizer)
        logits_BV = decoding.read_prompt()
        drawn, ended = [], torch.zeros(len(chosen), dtype=torch.bool, device=logits_BV.device)
        while True:
            logits_BV[:, never] = float("-inf")
            new_B = next_tokens(logits_BV, temperature, top_k, top_p, generator)
            drawn.append(new_B)
            ended |= new_B == tokenizer.end
            if ended.all() or len(drawn) == max_new:
                break
            logits_BV = decoding.read(new_B)
        for i, row in zip(chosen, torch.stack(drawn, dim=1).tolist()):
            responses[i] = row[:row.index(tokenizer.end) + 1] if tokenizer.end in row else row
    return responses

"""Published weights: every family's logits are the reference library's; files, names and tokenizers, each with
its faults.
"""
import json
from pathlib import Path

import pytest
import torch

import layouts
import masks
import model as networks
import weights
from model import KVCache

GOLDENS = Path(__file__).parent / "goldens"
FAMILIES = sorted(path.stem for path in GOLDENS.glob("*.safetensors"))
PREFIX, PROMPT = 4, 5                                     # as in make_goldens.py
families = pytest.mark.parametrize("name", FAMILIES)


def golden(name: str):
    """(published tensors, config.json, inputs and logits) of a golden file"""
    tensors, metadata = weights.read_safetensors(GOLDENS / f"{name}.safetensors")
    published = {key.removeprefix("model/"): tensors[key] for key in tensors if key.startswith("model/")}
    return published, json.loads(metadata["config"]), {k: tensors[k] for k in tensors if "/" not in k}


def imported(name: str) -> networks.LanguageModel:
    """The golden's model, built and loaded as an import does it."""
    published, c, _ = golden(name)
    layout, config = layouts.read_config(c)
    with torch.device("meta"):
        model = networks.build(config)
    model.load_state_dict(weights.to_ours(published, layout, config), assign=True)
    return model.float().requires_grad_(False)


def assert_agrees(logits, expected):
    """To 1e-4 of the reference logits' spread."""
    assert (logits - expected).abs().max() <= 1e-4 * expected.std()


# ---- logits of the reference library -----------------------------------------------------------------------

def decoder_logits(model, case, prefix: int = 0):
    """All logits of the case's rows, some padded on the left, some on the right."""
    document = case["real"] - 1
    within, B, T = masks.same_document(document, document), *document.shape
    part = (torch.arange(T) >= prefix).long().expand(B, T)
    allowed = within & (masks.causal | masks.prefix(part)) | masks.padding_query(document)
    return model.logits(model.decode(case["tokens"], case["positions"], masks.dense(allowed, B, T, T)))


def encoded(model, case):
    """(memory, cross mask for one query) of the case's sources."""
    document = case["source_real"] - 1
    (B, S), within = document.shape, masks.same_document(document, document)
    memory = model.encode(case["source"], torch.arange(S).expand(B, S), masks.dense(within, B, S, S))
    return memory, masks.dense(masks.padding(document), B, 1, S)


@families
def test_logits_are_the_references(name):
    model, case = imported(name), golden(name)[2]
    if "source" not in case:
        real = case["real"] > 0
        return assert_agrees(decoder_logits(model, case)[real], case["logits"][real])
    B, T = case["tokens"].shape
    causal = masks.dense(masks.causal, B, T, T)
    hidden = model.decode(case["tokens"], torch.arange(T).expand(B, T), causal, *encoded(model, case))
    assert_agrees(model.logits(hidden), case["logits"])


def test_logits_under_a_prefix_mask_are_the_references():
    case = golden("chatglm2")[2]
    real, logits = case["real"] > 0, decoder_logits(imported("chatglm2"), case, PREFIX)
    assert_agrees(logits[real], case["prefix_logits"][real])
    assert (case["prefix_logits"] - case["logits"]).abs().max() > 0.1


@families
def test_cached_decoding_gives_the_references_logits(name):
    """A prompt at once, then token by token. The reference's own cache was compared when the golden was made."""
    model, case = imported(name), golden(name)[2]
    (B, T), cross = case["tokens"].shape, encoded(model, case) if "source" in case else ()
    real, positions = case.get("real", torch.ones(B, T)) > 0, case.get("positions", torch.arange(T).expand(B, T))
    cache = KVCache(model.config, B, T, "cpu")
    for start, end in ((0, PROMPT), *((t, t + 1) for t in range(PROMPT, T))):
        q, k = torch.arange(start, end)[:, None], torch.arange(end)
        allowed = (k <= q) & (real[:, None, None, :end] | ~real[:, None, start:end, None])
        hidden = model.decode(case["tokens"][:, start:end], positions[:, start:end], allowed, *cross, cache=cache)
        seen = real[:, start:end]
        assert_agrees(model.logits(hidden)[seen], case["logits"][:, start:end][seen])

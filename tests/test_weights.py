"""Published weights: every family's logits are the reference library's; files, names and tokenizers, each
with its faults.
"""
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import common
import data
import generate
import layouts
import masks
import model as networks
import published_tokenizers
import train_ppo
import train_pretrain
import train_rm
import train_sft
import weights
from errors import UserError
from model import KVCache
from tokenizer import Tokenizer

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
    """A prompt at once, then token by token. The reference's own cache agreed when the golden was made."""
    model, case = imported(name), golden(name)[2]
    (B, T), cross = case["tokens"].shape, encoded(model, case) if "source" in case else ()
    real = case.get("real", torch.ones(B, T)) > 0
    positions = case.get("positions", torch.arange(T).expand(B, T))
    cache = KVCache(model.config, B, T, "cpu")
    for start, end in ((0, PROMPT), *((t, t + 1) for t in range(PROMPT, T))):
        q, k = torch.arange(start, end)[:, None], torch.arange(end)
        allowed = (k <= q) & (real[:, None, None, :end] | ~real[:, None, start:end, None])
        hidden = model.decode(case["tokens"][:, start:end], positions[:, start:end], allowed, *cross,
                              cache=cache)
        seen = real[:, start:end]
        assert_agrees(model.logits(hidden)[seen], case["logits"][:, start:end][seen])


# ---- names -------------------------------------------------------------------------------------------------

def as_read(tensors: dict) -> dict:
    return {name: tensors[name].clone() for name in tensors}


@families
def test_an_untouched_golden_has_nothing_left_over(name):
    """Every tensor is used once or named as one to leave out."""
    published, c, _ = golden(name)
    layout, config = layouts.read_config(c)
    parts = [part.name for of in weights.plan(layout, config).values() for part in of]
    assert len(parts) == len(set(parts))
    assert sum(x.numel() for x in weights.to_ours(published, layout, config).values()) == sum(
        published[key].numel() for key in published if key.removeprefix(layout.prefix) in parts)


@pytest.mark.parametrize("change, sentence", [
    (lambda t: t.pop("model.norm.weight"), r"1 tensors.*missing model.norm.weight \(32,\)"),
    (lambda t: t.update({"model.new": torch.ones(2, 3)}), r"unexpected model.new \(2, 3\)"),
    (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"model.norm.weight is \(31,\), not \(32,\)"),
    (lambda t: t.update({"model.norm.weight": torch.arange(32)}), "model.norm.weight has dtype int64"),
    (lambda t: [t.pop(k) for k in list(t)[:7]], r"7 tensors.*missing .*; \.\.\.$")])
def test_tensors_that_do_not_fit_are_named(change, sentence):
    published, c, _ = golden("llama")
    layout, config = layouts.read_config(c)
    tensors = as_read(published)
    change(tensors)
    with pytest.raises(ValueError, match=sentence):
        weights.to_ours(tensors, layout, config, "folder")


def test_copies_are_compared_and_stand_in_for_one_another():
    """A tied head that differs is refused; without the embedding the head is read; BART's bias is zero."""
    published, c, _ = golden("falcon_7b")
    layout, config = layouts.read_config(c)
    tensors, expected = as_read(published), weights.to_ours(published, layout, config)
    del tensors["transformer.word_embeddings.weight"]
    found = weights.to_ours(tensors, layout, config)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    tensors = as_read(published)
    tensors["lm_head.weight"] += 1
    with pytest.raises(ValueError, match="lm_head.weight is not embedding.weight"):
        weights.to_ours(tensors, layout, config)
    published, c, _ = golden("bart")
    tensors = as_read(published)
    tensors["final_logits_bias"] += 1
    with pytest.raises(ValueError, match="final_logits_bias is not zeros"):
        weights.to_ours(tensors, *layouts.read_config(c))


@pytest.mark.parametrize("name, harmless", [
    ("t5", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
    ("gpt2", "h.1.attn.masked_bias"), ("bart", "model.encoder.version"),
    ("falcon_7b", "transformer.h.0.self_attention.rotary_emb.inv_freq"),
    ("chatglm2", "transformer.rotary_pos_emb.inv_freq"),
    ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq")])
def test_what_published_files_hold_besides_is_left_out(name, harmless):
    published, c, _ = golden(name)
    weights.to_ours({**as_read(published), harmless: torch.ones(3)}, *layouts.read_config(c))
    with pytest.raises(ValueError, match="unexpected"):
        weights.to_ours({**as_read(published), harmless + "x": torch.ones(3)}, *layouts.read_config(c))


def test_a_prefix_may_stand_before_all_names():
    published, c, _ = golden("gpt2")
    layout, config = layouts.read_config(c)
    longer = {f"transformer.{name}": published[name] for name in published}
    first, second = (weights.to_ours(tensors, layout, config) for tensors in (published, longer))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name, change, sentence", [
    ("llama", {"model_type": "mamba"}, "model_type 'mamba'; known are gpt2, llama"),
    ("llama", {"hidden_act": "relu"}, "hidden_act 'relu'; built here is 'silu' alone"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling"),
    ("llama", {"hidden_size": None}, "no 'hidden_size'"),
    ("baichuan_7b", {"z_loss_weight": 0}, "Baichuan 2"),
    ("falcon_7b", {"alibi": True}, "alibi True"), ("falcon_7b", {"multi_query": False}, "multi_query False"),
    ("chatglm2", {"rmsnorm": False}, "rmsnorm False"),
    ("chatglm2", {"multi_query_attention": None}, "multi_query_attention False"),      # None: not in the file
    ("t5", {"num_decoder_layers": 3}, "num_decoder_layers 3"),
    ("bart", {"scale_embedding": True}, "scale_embedding True")])
def test_configurations_that_are_not_built_here_are_refused(name, change, sentence):
    c = {key: value for key, value in (golden(name)[1] | change).items() if value is not None}
    with pytest.raises(ValueError, match=sentence):
        layouts.read_config(c)


PUBLISHED_CONFIGS = {
    "gpt2": dict(model_type="gpt2", vocab_size=50257, n_layer=12, n_embd=768, n_head=12, n_positions=1024),
    "llama-7b": dict(model_type="llama", vocab_size=32000, num_hidden_layers=32, hidden_size=4096,
                     num_attention_heads=32, intermediate_size=11008, rms_norm_eps=1e-6),
    "llama2-70b": dict(model_type="llama", vocab_size=32000, num_hidden_layers=80, hidden_size=8192,
                       num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672,
                       rms_norm_eps=1e-5),
    "baichuan-13b": dict(model_type="baichuan", vocab_size=64000, num_hidden_layers=40, hidden_size=5120,
                         num_attention_heads=40, intermediate_size=13696, rms_norm_eps=1e-6),
    "falcon-7b": dict(model_type="RefinedWebModel", vocab_size=65024, n_layer=32, hidden_size=4544, n_head=71,
                      multi_query=True, parallel_attn=True),
    "falcon-40b": dict(model_type="RefinedWeb", vocab_size=65024, n_layer=60, hidden_size=8192, n_head=128,
                       n_head_kv=8),
    "chatglm-6b": dict(model_type="chatglm", vocab_size=130528, num_layers=28, hidden_size=4096,
                       num_attention_heads=32, inner_hidden_size=16384, position_encoding_2d=True,
                       gmask_token_id=130001),
    "chatglm2-6b": dict(model_type="chatglm", padded_vocab_size=65024, num_layers=28, hidden_size=4096,
                        num_attention_heads=32, multi_query_attention=True, multi_query_group_num=2,
                        kv_channels=128, ffn_hidden_size=13696, add_qkv_bias=True),
    "t5-11b": dict(model_type="t5", vocab_size=32128, num_layers=24, d_model=1024, num_heads=128, d_kv=128,
                   d_ff=65536),
    "flan-t5-base": dict(model_type="t5", vocab_size=32128, num_layers=12, d_model=768, num_heads=12, d_kv=64,
                         d_ff=2048, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart-large": dict(model_type="bart", vocab_size=50265, encoder_layers=12, decoder_layers=12,
                       d_model=1024, encoder_attention_heads=16, decoder_attention_heads=16,
                       encoder_ffn_dim=4096, decoder_ffn_dim=4096, max_position_embeddings=1024)}


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_a_published_configuration_is_our_preset(name):
    """Two independent sources of the same sizes and variants."""
    assert layouts.read_config(PUBLISHED_CONFIGS[name])[1] == networks.preset(name)


def test_chatglm_keeps_query_key_and_value_of_each_head_together():
    """Its published names, from a network of ours by loops over layers and heads."""
    layout, config = layouts.read_config(CHATGLM)
    ours = networks.build(config).state_dict()
    ours = {key: torch.randn(x.shape) for key, x in ours.items()}
    H, K, published = 4, 8, {"transformer.layers.0.attention.rotary_emb.inv_freq": torch.ones(2)}
    at = {"embedding": "word_embeddings", "decoder.norm": "final_layernorm"}
    for i in range(2):
        own, their = f"decoder.blocks.{i}", f"layers.{i}"
        at |= {f"{own}.attention_norm": f"{their}.input_layernorm", f"{own}.attention.out": f"{their}.attention.dense",
               f"{own}.ffn_norm": f"{their}.post_attention_layernorm",
               f"{own}.ffn.inner": f"{their}.mlp.dense_h_to_4h", f"{own}.ffn.out": f"{their}.mlp.dense_4h_to_h"}
        for kind in ("weight", "bias"):
            x, rows = ours[f"{own}.attention.qkv.{kind}"], []
            for head in range(H):
                for number in (head, H + head, 2 * H + head):                        # its query, key, value
                    rows += list(x[number * K:(number + 1) * K])
            published[f"transformer.{their}.attention.query_key_value.{kind}"] = torch.stack(rows)
    for own, their in at.items():
        for kind in ("weight", "bias")[:1 + (own != "embedding")]:
            published[f"transformer.{their}.{kind}"] = ours[f"{own}.{kind}"]
    published["lm_head.weight"] = ours["embedding.weight"]
    read = weights.to_ours(published, layout, config)
    assert read.keys() == ours.keys() and all(torch.equal(read[key], ours[key]) for key in ours)


def test_chatglms_rows_are_source_gmask_sop_target(tmp_path):
    """Tokens, places, mask and counted tokens as its own code has them: the place stays that of [gMASK], <sop> is
    seen by what follows it alone, and two answers to a prompt each have one of their own.
    """
    put_tokenizer(tmp_path, "gpt2")
    c = CHATGLM | ROLES["gpt2"][1]
    tokenizer = Tokenizer(*published_tokenizers.published(tmp_path, c, "prefix")[:2])
    sop, gmask, end, row = 0, 1, 3, data.Example([50, 51, 52], [[60, 61, 3], [70, 3]])
    batch = data.lay_out([row], "prefix", 1, tokenizer)
    assert batch.tokens.tolist() == [[50, 51, 52, gmask, sop, 60, 61, end, sop, 70, end]]
    assert batch.positions_2d.tolist() == [[[0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3]], [[0, 0, 0, 0, 1, 2, 3, 4, 1, 2, 3]]]
    assert batch.loss_mask.int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 0]]
    assert batch.targets[batch.loss_mask].tolist() == [60, 61, end, 70, end]
    seen = masks.dense(masks.predicates("prefix", batch).attention, 1, 11, 11)[0, 0].int().tolist()
    assert seen[:4] == [[1, 1, 1, 1] + 7 * [0]] * 4 and seen[4] == [1, 1, 1, 1, 1] + 6 * [0]
    assert seen[8] == [1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0]
    tokenizer.specials = {"<sop>": sop, "[gMASK]": gmask, "<pad>": 2, "<eop>": end}       # as they are named there
    objective = data.objective_of("glm_document", tokenizer, 9)
    text = data.lay_out([objective(list(range(50, 58)), np.random.default_rng(0))], "prefix", 1, tokenizer)
    n = text.tokens[0].tolist().index(gmask)
    assert text.tokens.tolist() == [[*range(50, 50 + n), gmask, sop, *range(50 + n, 58)]]     # one [gMASK], not two
    assert text.targets[text.loss_mask].tolist() == [*range(50 + n, 58), end]
    with_end = data.lay_out([objective([*range(50, 58), end], np.random.default_rng(0))], "prefix", 1, tokenizer)
    assert torch.equal(with_end.tokens, text.tokens) and torch.equal(with_end.targets, text.targets)
    names = {i: name for name, i in tokenizer.settings["specials"].items()}
    shown = data.show(row, "prefix", tokenizer)
    assert f"{names[gmask]}{names[sop]}[[" in shown and shown.count(names[sop]) == 1


@pytest.mark.parametrize("gmask", [None, 70])
def test_a_gmask_that_the_tokenizer_does_not_have_is_one_sentence(gmask, tmp_path):
    put_tokenizer(tmp_path, "gpt2")
    with pytest.raises(UserError, match=f"gmask_token_id {gmask} and bos_token_id 0 must be special"):
        published_tokenizers.published(tmp_path, CHATGLM | ROLES["gpt2"][1] | {"gmask_token_id": gmask}, "prefix")


def test_chatglm_decodes_with_the_cache_as_without(tmp_path):
    """Prompts of unequal length in one batch, greedy; the rows that training would lay out give the same tokens."""
    command(f"import {put_checkpoint(tmp_path / 'published', 'chatglm')} {tmp_path / 'run'}")
    tokenizer = checkpoint.load_tokenizer(tmp_path / "run", "")
    model = checkpoint.load_language_model(tmp_path / "run")
    prompts = [[50, 51, 52], [80], [90, 91, 92, 93, 94]]
    answers = generate.generate(model, prompts, tokenizer, 6, temperature=0.0)
    for prompt, answer in zip(prompts, answers):
        batch = data.lay_out([data.Example(prompt, [answer])], "prefix", 1, tokenizer)
        with torch.no_grad():
            logits = model(batch, masks.of_batch("prefix", batch), batch.loss_mask)
        assert generate.drawn_from(logits, tokenizer, 1.0).argmax(-1).tolist() == answer


# ---- files -------------------------------------------------------------------------------------------------

EVERY_DTYPE = {name: torch.tensor([[1, 0, 3]]).to(dtype) for name, dtype in weights.DTYPES.items()} | {
    "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "a view": torch.arange(12.0).view(3, 4).T}


def test_a_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "x.safetensors"
    weights.write_safetensors(path, EVERY_DTYPE, {"format": "pt"})
    tensors, metadata = weights.read_safetensors(path)
    assert metadata == {"format": "pt"} and set(tensors) == set(EVERY_DTYPE)
    assert list(tmp_path.iterdir()) == [path]
    for name, x in EVERY_DTYPE.items():
        assert tensors[name].dtype == x.dtype and torch.equal(tensors[name].float(), x.float()), name
    before = path.read_bytes()
    tensors["F32"].add_(1)                                # copy-on-write: the file stays as it is
    assert path.read_bytes() == before and torch.equal(tensors["F32"], EVERY_DTYPE["F32"])


def save_checkpoint(path: Path, x: torch.Tensor) -> None:
    run, module = common.Run(path.parent, torch.device("cpu"), torch.float32), torch.nn.Linear(1, 1)
    module.weight.data.fill_(float(x.sum()))
    checkpoint.save(run, int(path.stem.split("-")[1]), weights.Config("", "", ""), networks.ModelConfig(), model=module)


WRITERS = {"x.safetensors": lambda path, x: weights.write_safetensors(path, {"x": x}, {}),
           "x.json": lambda path, x: common.write_atomically(path, str(x.tolist()).encode()),
           "checkpoint-0000003.pt": save_checkpoint}


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_that_breaks_off_leaves_the_old_file(name, tmp_path, monkeypatch):
    """A full disk, told at the last moment: the old content stays, and nothing else."""
    def full(descriptor):
        raise OSError("no space left on the device")
    path, write = tmp_path / name, WRITERS[name]
    write(path, torch.ones(3))
    before, file_number = path.read_bytes(), path.stat().st_ino
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("os.fsync", full)
        write(path, torch.zeros(3))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    write(path, torch.zeros(3))                          # another file takes its place; none is written over
    assert path.read_bytes() != before and path.stat().st_ino != file_number
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    half, other = tmp_path / "checkpoint-0000003.pt.77.tmp", tmp_path / "notes.tmp"
    half.touch()
    other.touch()
    save_checkpoint(tmp_path / "checkpoint-0000004.pt", torch.ones(3))
    assert checkpoint.steps_of(tmp_path) == [4] and other.exists() and not half.exists()


def test_tensors_at_odd_places_are_read(tmp_path):
    """One byte before a float32: nothing in the format forbids it."""
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
              "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}
    write_raw(tmp_path / "x.safetensors", header, b"\7" + torch.tensor([1.5, 2.5]).numpy().tobytes())
    b = weights.read_safetensors(tmp_path / "x.safetensors")[0]["b"]
    assert b.tolist() == [1.5, 2.5] and b.data_ptr() % 4 == 0


def write_raw(path: Path, header: dict | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def line(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("header, n_bytes, sentence", [
    ({"a": line()}, 7, "cut short"), ({"a": line()}, 9, "something added"),
    ({"a": line(), "b": line(offsets=(9, 17))}, 17, "tensor b leaves a hole before it: it begins"),
    ({"a": line(), "b": line(offsets=(4, 12))}, 12, "tensor b overlaps"),
    ({"a": line(offsets=(8, 0))}, 8, "tensor a, F32"),
    ({"a": line(shape=(3,))}, 8, "takes 12 bytes; .* hold 8"),
    ({"a": line(dtype="F16")}, 8, "takes 4 bytes"), ({"a": line(dtype="Q4")}, 8, "tensor a has dtype Q4"),
    ({"a": line(offsets=(-8, 0))}, 8, "tensor a is described by"),
    ({"a": {"dtype": "F32"}}, 8, "tensor a is described"),
    ({"a": 3}, 8, "tensor a is described"), ({"a": line(shape=(2.0,))}, 8, "whole numbers"),
    ("[1]", 0, "no JSON object"), ("{", 0, "no JSON object"),
    ('{"a": 1, "a": 2}', 0, "'a' stands there twice")])
def test_a_faulty_file_is_one_sentence(header, n_bytes, sentence, tmp_path):
    path = tmp_path / "x.safetensors"
    write_raw(path, header, b"\0" * n_bytes)
    with pytest.raises(ValueError, match=sentence) as error:
        weights.read_safetensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_every_cut_and_every_flipped_header_byte_is_noticed(tmp_path):
    """Cut anywhere, or one byte of the offsets changed, the file is refused or gives the same tensors."""
    path, whole = tmp_path / "x.safetensors", tmp_path / "whole.safetensors"
    weights.write_safetensors(whole, {"a": torch.arange(3.0), "b": torch.arange(4).to(torch.int16)}, {})
    content = whole.read_bytes()
    for n in range(len(content)):
        path.write_bytes(content[:n])
        with pytest.raises(ValueError):
            weights.read_safetensors(path)
    for at in (i for i, byte in enumerate(content[:-20]) if chr(byte).isdigit()):
        path.write_bytes(content[:at] + b"5" + content[at + 1:])
        if path.read_bytes() != content:
            with pytest.raises(ValueError):
                weights.read_safetensors(path)


def shards(folder: Path, tensors: dict) -> dict:
    """Two files and their index; returns the weight_map."""
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    for file, here in halves.items():
        weights.write_safetensors(folder / file, {name: tensors[name] for name in here}, {"format": "pt"})
    return {name: file for file, here in halves.items() for name in here}


def test_shards_are_one_checkpoint(tmp_path):
    where, index = shards(tmp_path, EVERY_DTYPE), tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    tensors = weights.read_folder(tmp_path)
    assert set(tensors) == set(EVERY_DTYPE) and torch.equal(tensors["I64"], EVERY_DTYPE["I64"])
    for wrong, sentence in (({**where, "more": "model-1.safetensors"}, "disagree about 1 tensors: more"),
                            ({k: v for k, v in where.items() if k != "I64"}, "disagree about 1 tensors: I64"),
                            ({**where, "I64": "../x.safetensors"}, "no weight_map"),
                            ({**where, "a view": "model-0.safetensors"}, "model-0.safetensors, which")):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match=sentence):
            weights.read_folder(tmp_path)


def test_large_checkpoints_are_written_in_shards(tmp_path):
    """Files of up to so many bytes and an index, read back the same; another division leaves nothing behind."""
    tensors = {f"layer.{i}": torch.randn(3, 5 + i) for i in range(7)} | {"large": torch.randn(100)}
    for shard, files in ((200, 6), (10**6, 1), (150, 7)):
        weights.write_folder(tmp_path, tensors, shard)
        written = sorted(tmp_path.iterdir())
        assert len(written) == files + (files > 1)
        read = weights.read_folder(tmp_path)
        assert set(read) == set(tensors) and all(torch.equal(read[name], x) for name, x in tensors.items())
        sizes = [sum(x.nbytes for x in weights.read_safetensors(path)[0].values())
                 for path in written if path.suffix == ".safetensors"]
        assert files == 1 or all(size <= max(shard, 400) for size in sizes)


@pytest.mark.parametrize("header", [
    '{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}', "[" * 200_000,
    '{"a": {"dtype": {}, "shape": [2], "data_offsets": [0, 8]}}'])
def test_headers_of_odd_values_are_one_sentence(header, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(UserError, match="tensor a is described by|no JSON object of tensors"):
        weights.read_safetensors(path)


# ---- tokenizers --------------------------------------------------------------------------------------------

KINDS = json.loads((GOLDENS / "tokenizers.json").read_text(encoding="utf-8"))
TEXTS, KINDS = KINDS["texts"], KINDS["kinds"]
ROLES = {"gpt2": ("causal", {"eos_token_id": 3}), "split": ("causal", {"eos_token_id": [3, 2]}),
         "bart": ("encdec", {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
                             "decoder_start_token_id": 2}),
         "falcon": ("causal", {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}),
         "llama": ("causal", {"bos_token_id": 1, "eos_token_id": 2}),
         "t5": ("encdec", {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0})}


def put_tokenizer(folder: Path, kind: str) -> None:
    for file, content in KINDS[kind]["files"].items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / file).write_text(text, encoding="utf-8")


def tokenizer_of(folder: Path, kind: str) -> Tokenizer:
    """The published tokenizer, and again after a run folder has kept it."""
    put_tokenizer(folder, kind)
    structure, c = ROLES[kind]
    made = Tokenizer(*published_tokenizers.published(folder, c, structure)[:2])
    made.save(folder / "run" / "tokenizer.tiktoken")
    again = Tokenizer.load(folder / "run" / "tokenizer.tiktoken")
    assert vars(again).keys() == vars(made).keys() and again.text == made.text and again.ranks == made.ranks
    return again


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_tokenizer_gives_the_published_ids(kind, tmp_path):
    if kind in ("falcon", "llama", "t5"):
        pytest.importorskip("tokenizers")
    tokenizer, expected = tokenizer_of(tmp_path, kind), KINDS[kind]["ids"]
    assert [tokenizer.encode(text) for text in TEXTS] == expected == tokenizer.encode_all(TEXTS)
    for text, ids in zip(TEXTS, expected):
        if kind != "t5":                            # which knows neither new lines nor all characters
            assert tokenizer.decode(ids).strip(" ") == text.strip(" ")
            in_front = kind == "llama" and text != ""             # a space
            assert int(tokenizer.bytes_per_token()[ids].sum()) == len(text.encode()) + in_front
    assert all(i in tokenizer.text or kind == "t5" for ids in expected for i in ids)
    assert tokenizer.encoding.decode([*expected[0], tokenizer.end]).endswith(("</s>", "<|end|>"))
    assert tokenizer.vocab > max(max(ids, default=0) for ids in expected)
    assert tokenizer.sentence_ends() > {tokenizer.end}
    assert tokenizer.encode("caf\udce9") != []                  # a byte that is no text, as a terminal may send it


def test_rows_open_and_close_as_the_published_model_was_trained(tmp_path, monkeypatch):
    """And what a published vocabulary lacks is chosen and said."""
    monkeypatch.setattr(published_tokenizers, "Pieces", lambda *_: None)
    monkeypatch.setattr("tokenizer.Pieces", lambda *_: None)
    rows = {}
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        made = tokenizer_of(tmp_path / kind, kind)
        rows[kind] = (made.pad, made.begin, made.source_end, made.target_begin, made.end)
    assert rows == {"gpt2": (3, [3], [], [], 3), "split": (3, [3], [], [], 3),
                    "falcon": (1, [0], [], [], 2), "llama": (2, [1], [], [], 2),
                    "bart": (1, [0], [2], [2, 0], 2), "t5": (0, [], [1], [0], 1)}
    told = published_tokenizers.published(tmp_path / "gpt2", {"eos_token_id": 3}, "causal")[2]
    assert "no padding token, <|end|> fills rows" in told and "texts begin with <|end|>" in told
    assert made.sentinels == [made.specials[f"<extra_id_{i}>"] for i in range(3)]


def test_a_missing_package_is_asked_for_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        tokenizer_of(tmp_path, "llama")


@pytest.mark.parametrize("change, sentence", [
    (lambda folder: (folder / "merges.txt").unlink(), "neither tokenizer.json nor vocab.json"),
    (lambda folder: (folder / "vocab.json").rename(folder / "tokenizer.model"),
     "Of a tokenizer.model .*AutoTokenizer.from_pretrained"),
    (lambda folder: (folder / "merges.txt").write_text("a zz"), "merges to 'azz'"),
    (lambda folder: (folder / "vocab.json").write_text('{"a": 0}'), "no token for 255 of the 256 bytes"),
    (lambda folder: (folder / "vocab.json").write_text("{"), "cannot be read"),
    (lambda folder: (folder / "vocab.json").write_text("[1]"), "not as tokenizers have them"),
    (lambda folder: (folder / "merges.txt").write_text("a b c"), "not as tokenizers have them"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "not as tokenizers have them .*'model'"),
    (lambda folder: (folder / "tokenizer.json").write_text("[]"), "not as tokenizers have them")])
def test_a_faulty_tokenizer_is_one_sentence(change, sentence, tmp_path):
    put_tokenizer(tmp_path, "gpt2")
    change(tmp_path)
    with pytest.raises(UserError, match=sentence), published_tokenizers.read_with_care(tmp_path):
        published_tokenizers.published(tmp_path, {"eos_token_id": 3}, "causal")


@pytest.mark.parametrize("kind, change, sentence", [
    ("split", lambda content: content["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="("), "not as token"),
    ("split", lambda content: content["added_tokens"][0].update(id="3"), "'3' is no id"),
    ("split", lambda content: content["added_tokens"][0].update(id=-1), "-1 is no id"),
    ("t5", lambda content: content.update(normalizer={"type": "FromTheFuture"}), "tokenizers cannot read this")])
def test_a_tokenizer_that_cannot_be_run_is_one_sentence(kind, change, sentence, tmp_path):
    """A pattern that does not parse, ids that are none, rules that the package does not know."""
    if kind == "t5":
        pytest.importorskip("tokenizers")
    put_tokenizer(tmp_path, kind)
    structure, c = ROLES[kind]
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=sentence), published_tokenizers.read_with_care(tmp_path):
        Tokenizer(*published_tokenizers.published(tmp_path, c, structure)[:2])


@pytest.mark.parametrize("start", [99999, "<pad>"])
def test_a_decoder_that_starts_with_no_token_is_refused(start, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenizer.Pieces", lambda *_: None)
    put_tokenizer(tmp_path, "t5")
    structure, c = ROLES["t5"]
    with pytest.raises(UserError, match=f"decoder_start_token_id is {start}"):
        published_tokenizers.published(tmp_path, {**c, "decoder_start_token_id": start}, structure)
    told = published_tokenizers.published(tmp_path, {**c, "decoder_start_token_id": None}, structure)[1]
    assert told["target_begin"] == [c["pad_token_id"]]


def test_a_tensor_that_is_there_twice_is_refused():
    """With the prefix and without it: which of the two should be read?"""
    published, c, _ = golden("gpt2")
    layout, config = layouts.read_config(c)
    twice = {f"transformer.{name}": published[name] for name in published}
    twice["wte.weight"] = torch.zeros_like(published["wte.weight"])
    with pytest.raises(UserError, match="both wte.weight and transformer.wte.weight"):
        weights.to_ours(twice, layout, config)


def test_packed_rows_of_an_imported_encoder_decoder(tmp_path):
    """BART: <s> source </s>, then </s> <s> target; the loss counts the target alone."""
    tokenizer = tokenizer_of(tmp_path, "bart")
    batch = data.lay_out([data.Example([10, 11], [[20, 21, 2]])], "encdec", 9, tokenizer)
    assert batch.source.tolist() == [[0, 10, 11, 2]] and batch.tokens.tolist() == [[2, 0, 20, 21, 2]]
    assert batch.targets[batch.loss_mask].tolist() == [20, 21, 2]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4]]


# ---- import and export -------------------------------------------------------------------------------------

# there is no golden of ChatGLM-6B: its code comes with its weights, and no other network has its block
CHATGLM = dict(model_type="chatglm", position_encoding_2d=True, vocab_size=400, num_layers=2, hidden_size=32,
               num_attention_heads=4, inner_hidden_size=48, bos_token_id=0, gmask_token_id=1, pad_token_id=2)


def put_checkpoint(folder: Path, name: str, kind: str = "gpt2", **changes) -> Path:
    """A published folder: the golden's sizes, more tokens than the tokenizer has, random weights."""
    c = CHATGLM if name == "chatglm" else golden(name)[1]
    c = c | {"vocab_size": 400, **ROLES[kind][1], **changes}
    c |= {key: 99 for key in ("n_positions", "max_position_embeddings") if key in c}
    layout, config = layouts.read_config(c)
    parts = [part for of in weights.plan(layout, config).values() for part in of]
    dtype = torch.bfloat16 if name == "llama" else torch.float32
    tensors = {part.name: (torch.randn(part.shape) / 5).to(dtype) for part in parts}
    folder.mkdir(parents=True)
    weights.write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(c))
    put_tokenizer(folder, kind)
    return folder


def command(text: str) -> None:
    weights.main(weights.parse(weights.Config, text.split(), ""))


@pytest.mark.parametrize("name, change, sentence", [
    ("gpt2", {"n_layer": "2"}, "wrong value"), ("gpt2", {"n_layer": 2.5}, "makes layers 2.5"),
    ("gpt2", {"n_embd": 24.0}, "makes width 24.0"), ("gpt2", {"n_head": None}, "wrong value"),
    ("gpt2", {"vocab_size": [1]}, "wrong value"), ("gpt2", {"model_type": ["gpt2"]}, "has model_type"),
    ("llama", {"rope_parameters": [1]}, "wrong value"), ("llama", {"rope_theta": "x"}, "wrong value"),
    ("chatglm2", {"position_encoding_2d": True}, "no gmask_token_id: this is ChatGLM-6B's first release"),
    ("chatglm2", {"position_encoding_2d": True, "gmask_token_id": 7, "quantization_bit": 4},
     "quantization_bit 4")])
def test_a_faulty_config_is_one_sentence(name, change, sentence):
    with pytest.raises(UserError, match=sentence):
        layouts.read_config(golden(name)[1] | change)


def test_a_prompt_longer_than_the_encoders_positions_is_one_sentence(tmp_path):
    """BART's encoder has learned positions too."""
    command(f"import {put_checkpoint(tmp_path / 'published', 'bart', 'bart')} {tmp_path / 'run'}")
    with pytest.raises(UserError, match="the model has 99 positions, and a prompt 243 tokens"):
        generate.main(generate.Config(run=str(tmp_path / "run"), prompt="a b " * 80, max_new=2, device="cpu"))


def test_a_row_of_source_and_target_fits_learned_positions(tmp_path):
    """A denoising objective puts up to twice the context into a decoder's row."""
    command(f"import {put_checkpoint(tmp_path / 'published', 'gpt2')} {tmp_path / 'run'}")
    config = train_pretrain.Config(init=str(tmp_path / "run"), context=50, objective="document_rotation")
    run, tokenizer = SimpleNamespace(print=print, device="cpu"), None
    with pytest.raises(UserError, match="run has learned 99 positions; under document_rotation"):
        train_pretrain.build_model(config, run, tokenizer)
    for fits in (dataclasses.replace(config, context=49), dataclasses.replace(config, objective="prefix_lm")):
        assert train_pretrain.build_model(fits, run, tokenizer).config.max_positions == 99


@pytest.mark.parametrize("name, layout, kind", [("gpt2", "gpt2", "gpt2"), ("llama", "llama", "gpt2"),
                                                ("t5", "t5", "bart"), ("flan_t5", "t5", "bart"),
                                                ("flan_t5", "t5", "t5")])
def test_import_and_export_give_the_same_file(name, layout, kind, tmp_path):
    """Bit by bit, and a second import gives the same run."""
    if kind == "t5":
        pytest.importorskip("tokenizers")
    folder, run, out = put_checkpoint(tmp_path / "published", name, kind), tmp_path / "run", tmp_path / "out"
    command(f"import {folder} {run}")
    command(f"export {run} {out} --layout {layout}")
    first, second = (weights.read_safetensors(where / "model.safetensors")[0] for where in (folder, out))
    assert set(first) == set(second) and all(torch.equal(first[key], second[key]) for key in first)
    assert {key: first[key].dtype for key in first} == {key: second[key].dtype for key in second}
    assert {p.dtype for p in checkpoint.load_model(run).parameters()} == {torch.float32}
    command(f"import {out} {tmp_path / 'again'}")
    a, b = (checkpoint.latest(where) for where in (run, tmp_path / "again"))
    assert a["model_config"] == b["model_config"]
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    before, after = (checkpoint.load_tokenizer(where, "") for where in (run, tmp_path / "again"))
    assert_alike(before, after, a["model_config"]["structure"])


@pytest.mark.parametrize("words", ["import {0} {0}", "import {0} {0}/../published --overwrite",
                                   "export {0} {0} --layout llama"])
def test_a_folder_is_not_written_over_itself(words, tmp_path):
    """Its config.json would be lost."""
    folder = put_checkpoint(tmp_path / "published", "llama", "gpt2")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="both what is read and what is written"):
        command(words.format(folder))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_alike(before: Tokenizer, after: Tokenizer, structure: str):
    """Both encode, pad, end, open and close alike."""
    assert [before.encode(text) for text in TEXTS] == [after.encode(text) for text in TEXTS]
    assert before.specials == after.specials and before.frame(structure) == after.frame(structure)
    assert (before.pad, before.end, before.vocab) == (after.pad, after.end, after.vocab)


@pytest.mark.parametrize("structure", ["causal", "encdec"])
def test_an_exported_tokenizer_is_read_again(structure, tokenizer, tmp_path):
    """Ours, as tokenizer.json: the same tokens and frames, which the package `tokenizers` finds too."""
    content = tokenizer.published()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    c = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad,
         "decoder_start_token_id": tokenizer.bos}
    again = Tokenizer(*published_tokenizers.published(tmp_path, c, structure)[:2])
    assert_alike(tokenizer, again, structure)
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    for text in (text for text in TEXTS if "<pad>" not in text):       # there it sees a special token
        assert theirs.encode(text).ids == [tokenizer.bos, *tokenizer.encode(text)]
        assert theirs.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name, objective", [("bart", "next_token"), ("gpt2", "prefix_lm"), ("chatglm", "glm_130b"),
                                             ("chatglm", "glm_document")])
def test_pretraining_goes_on_from_an_imported_run(name, objective, no_curves, tmp_path, monkeypatch):
    """At as many tokens as there are learned positions; ChatGLM-6B's texts end with the <eop> of its blanks."""
    monkeypatch.chdir(tmp_path)
    put_checkpoint(tmp_path / "published", name, "bart" if name == "bart" else "gpt2")
    command("import published runs/imported")
    if name == "chatglm":
        path = Path("runs/imported/tokenizer.settings.json")
        settings = json.loads(path.read_text())
        settings["specials"] = {"<sop>": 0, "[gMASK]": 1, "[MASK]": 2, "<eop>": 3}      # as its vocabulary names them
        path.write_text(json.dumps(settings))
    texts = [{"text": "many words in a text; " * (1 + i % 20)} for i in range(60)]
    Path("texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    config = train_pretrain.Config(
        data="texts.jsonl", init="runs/imported", out="runs/more", objective=objective, steps=6, batch_size=2,
        context=99, row=99, warmup=1, eval_every=0, save_every=0, device="cpu", dtype="fp32", ranks=1, lr=1e-3)
    with pytest.raises(UserError, match="holds imported weights"):
        train_pretrain.main(dataclasses.replace(config, init="", out="runs/imported"))
    last = train_pretrain.main(config)
    assert math.isfinite(last["loss"]) and Path("runs/more/samples.txt").exists()


@pytest.mark.parametrize("name, kind", [("gpt2", "gpt2"), ("llama", "split"), ("bart", "bart"), ("t5", "bart"),
                                        ("chatglm", "gpt2")])
def test_every_later_stage_goes_on_from_an_imported_run(name, kind, no_curves, tmp_path, monkeypatch):
    """generate.py, SFT, reward model, PPO; the padded part of the vocabulary is never drawn, and a sequence longer
    than the learned positions is refused before anything is written.
    """
    monkeypatch.chdir(tmp_path)
    command(f"import {put_checkpoint(tmp_path / 'published', name, kind)} runs/imported")
    texts = generate.main(generate.Config(run="runs/imported", prompt="def f(x):", max_new=10, device="cpu"))
    assert isinstance(texts[0], str)
    pairs = [{"prompt": f"{i}?", "response": f"{i}!"} for i in range(40)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    few = dict(data="pairs.jsonl", steps=1, batch_size=4, context=20, row=20, warmup=1, eval_every=0, eval_size=4,
               save_every=0, device="cpu", dtype="fp32", ranks=1, lr=1e-3)
    if name in ("gpt2", "bart"):
        with pytest.raises(ValueError, match="has learned 99 positions; context 100 is longer"):
            train_sft.main(train_sft.Config(**few | {"context": 100}, init="runs/imported", out="runs/sft"))
        with pytest.raises(ValueError, match="the model has 99 positions; a prompt of"):
            generate.main(generate.Config(run="runs/imported", prompt="?", max_new=100, device="cpu"))
        assert not Path("runs/sft").exists()
    last = [train_sft.main(train_sft.Config(**few, init="runs/imported", out="runs/sft")),
            train_rm.main(train_rm.Config(**few, init="runs/sft", out="runs/rm", prompts=8, answers=3, max_new=6)),
            train_ppo.main(train_ppo.Config(**few, init="runs/sft", reward="runs/rm", out="runs/ppo", max_new=6,
                                            minibatch_size=4, ptx_size=4))]
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in last)
    published = checkpoint.load_tokenizer("runs/imported", "")
    for run in ("runs/sft", "runs/rm", "runs/ppo"):
        assert checkpoint.load_model(run).config == checkpoint.load_model("runs/imported").config
        assert vars(checkpoint.load_tokenizer(run, "")).keys() == vars(published).keys()
        assert checkpoint.load_tokenizer(run, "").settings == published.settings
    if name in ("gpt2", "llama", "t5"):
        command(f"export runs/ppo out --layout {name}")
        assert weights.read_folder(Path("out")).keys() == weights.read_folder(Path("published")).keys()


@pytest.mark.parametrize("spoil, sentence", [
    (lambda folder: (folder / "config.json").unlink(), "config.json is not there"),
    (lambda folder: (folder / "config.json").write_text("[]"), "no JSON object"),
    (lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"PK"), "no safetensors file"),
    (lambda folder: (folder / "merges.txt").unlink(), "neither tokenizer.json nor"),
    (lambda folder: (folder / "config.json").write_text(json.dumps(json.loads(
        (folder / "config.json").read_text()) | {"vocab_size": 100})), "ids up to 339, the network has 100"),
    (lambda folder: weights.write_safetensors(folder / "model.safetensors", {}, {}), "missing wte.weight")])
def test_a_failed_import_writes_nothing(spoil, sentence, tmp_path):
    folder = put_checkpoint(tmp_path / "published", "gpt2")
    spoil(folder)
    with pytest.raises(ValueError, match=sentence):
        command(f"import {folder} {tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_what_a_layout_cannot_say_is_refused(tmp_path, random_model, tokenizer):
    run = common.Run(tmp_path / "run", torch.device("cpu"), torch.float32)
    config = weights.Config("export", str(run.folder), str(tmp_path / "out"))
    checkpoint.open_run(run, config, tokenizer, set())
    model = random_model("prefix")
    checkpoint.save(run, 1, config, model.config, model=model)
    for layout, sentence in (("llama", "structure 'prefix'"), ("gpt2", "is no gpt2.*norm 'rms'"),
                             ("bart", "one of gpt2")):
        with pytest.raises(ValueError, match=sentence):
            command(f"export {run.folder} {tmp_path / 'out'} --layout {layout}")
    bart = networks.preset("bart-base", layers=1, width=20, heads=4, head_width=5, vocab=400, max_positions=9)
    checkpoint.save(run, 2, config, bart, model=networks.build(bart))
    with pytest.raises(ValueError, match="run is no llama: heads 4 have head_width 5"):
        command(f"export {run.folder} {tmp_path / 'out'} --layout llama")
    checkpoint.save(run, 3, config, model.config, model=networks.ScalarModel(model))
    with pytest.raises(ValueError, match="reward model"):
        command(f"export {run.folder} {tmp_path / 'out'} --layout llama")
    assert not (tmp_path / "out").exists()


def test_the_command_line_fails_in_one_sentence(tmp_path):
    """Exit code 2 and no traceback; a run is not overwritten unasked."""
    folder = put_checkpoint(tmp_path / "published", "gpt2")
    command(f"import {folder} {tmp_path / 'run'}")
    program = [sys.executable, str(Path(weights.__file__)), "import", str(folder), str(tmp_path / "run")]
    failed = subprocess.run(program, capture_output=True, text=True)
    with pytest.raises(ValueError, match="--layout"):
        command("export a b")
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    command(f"import {folder} {tmp_path / 'run'} --overwrite")


MEASURED = """
import sys, weights
def kilobytes(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
def run(name):
    weights.main(weights.parse(weights.Config, ["import", f"{sys.argv[1]}/{name}", f"{sys.argv[1]}/{name}-run"], ""))
run("small")                       # what the interpreter loads on the way is there before the measurement
before = kilobytes("VmRSS")
run("large")
print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured where Linux tells it")
def test_an_import_takes_little_more_memory_than_the_checkpoint(tmp_path):
    """At most 1.3 x its size, beside the interpreter, although most tensors are joined from three or two."""
    put_checkpoint(tmp_path / "small", "llama")
    large = put_checkpoint(tmp_path / "large", "llama", hidden_size=512, num_hidden_layers=8,
                           intermediate_size=2048)
    size = (large / "model.safetensors").stat().st_size
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True,
                          cwd=Path(weights.__file__).parent)
    assert size > 60e6 and int(done.stdout.split()[-1]) <= 1.3 * size, done.stderr

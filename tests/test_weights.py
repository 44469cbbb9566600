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
    (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}), "norm.weight has dtype int64"),
    (lambda t: [t.pop(k) for k in list(t)[:7]], r"7 tensors.*missing .*; \.\.\.$")])
def test_tensors_that_do_not_fit_are_named(change, sentence):
    published, c, _ = golden("llama")
    layout, config = layouts.read_config(c)
    tensors = as_read(published)
    change(tensors)
    with pytest.raises(ValueError, match=sentence):
        weights.to_ours(tensors, layout, config, "folder")


def test_copies_are_compared_and_stand_in_for_one_another():
    """A tied head that differs is refused; without the embedding the head is read; BART's bias must be zero."""
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
    ("chatglm2", {"position_encoding_2d": True}, "position_encoding_2d"),
    ("t5", {"num_decoder_layers": 3}, "num_decoder_layers 3"), ("bart", {"scale_embedding": True}, "scale_emb")])
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
    "chatglm2-6b": dict(model_type="chatglm", padded_vocab_size=65024, num_layers=28, hidden_size=4096,
                        num_attention_heads=32, multi_query_attention=True, multi_query_group_num=2,
                        kv_channels=128, ffn_hidden_size=13696, add_qkv_bias=True),
    "t5-11b": dict(model_type="t5", vocab_size=32128, num_layers=24, d_model=1024, num_heads=128, d_kv=128,
                   d_ff=65536),
    "flan-t5-base": dict(model_type="t5", vocab_size=32128, num_layers=12, d_model=768, num_heads=12, d_kv=64,
                         d_ff=2048, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart-large": dict(model_type="bart", vocab_size=50265, encoder_layers=12, decoder_layers=12, d_model=1024,
                       encoder_attention_heads=16, decoder_attention_heads=16, encoder_ffn_dim=4096,
                       decoder_ffn_dim=4096, max_position_embeddings=1024)}


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_a_published_configuration_is_our_preset(name):
    """Two independent sources of the same sizes and variants."""
    assert layouts.read_config(PUBLISHED_CONFIGS[name])[1] == networks.preset(name)


# ---- files -------------------------------------------------------------------------------------------------

EVERY_DTYPE = {name: torch.tensor([[1, 0, 3]]).to(dtype) for name, dtype in weights.DTYPES.items()} | {
    "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "a view": torch.arange(12.0).view(3, 4).T}


def test_a_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "x.safetensors"
    weights.write_safetensors(path, EVERY_DTYPE, {"format": "pt"})
    tensors, metadata = weights.read_safetensors(path)
    assert metadata == {"format": "pt"} and set(tensors) == set(EVERY_DTYPE) and len(list(tmp_path.iterdir())) == 1
    for name, x in EVERY_DTYPE.items():
        assert tensors[name].dtype == x.dtype and torch.equal(tensors[name].float(), x.float()), name
    before = path.read_bytes()
    tensors["F32"].add_(1)                                # copy-on-write: the file stays as it is
    assert path.read_bytes() == before and torch.equal(tensors["F32"], EVERY_DTYPE["F32"])


def test_tensors_at_odd_places_are_read(tmp_path):
    """One byte before a float32: nothing in the format forbids it."""
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
              "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}
    write_raw(tmp_path / "x.safetensors", header, b"\7" + torch.tensor([1.5, 2.5]).numpy().tobytes())
    assert weights.read_safetensors(tmp_path / "x.safetensors")[0]["b"].tolist() == [1.5, 2.5]


def write_raw(path: Path, header: dict | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def line(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("header, n_bytes, sentence", [
    ({"a": line()}, 7, "cut short"), ({"a": line()}, 9, "something added"),
    ({"a": line(), "b": line(offsets=(9, 17))}, 17, "tensor b leaves a hole before it: it begins"),
    ({"a": line(), "b": line(offsets=(4, 12))}, 12, "tensor b overlaps"),
    ({"a": line(offsets=(8, 0))}, 8, "tensor a, F32"), ({"a": line(shape=(3,))}, 8, "takes 12 bytes; .* hold 8"),
    ({"a": line(dtype="F16")}, 8, "takes 4 bytes"), ({"a": line(dtype="Q4")}, 8, "tensor a has dtype Q4"),
    ({"a": line(offsets=(-8, 0))}, 8, "tensor a is described by"), ({"a": {"dtype": "F32"}}, 8, "tensor a is described"),
    ({"a": 3}, 8, "tensor a is described"), ({"a": line(shape=(2.0,))}, 8, "whole numbers"),
    ("[1]", 0, "no JSON object"), ("{", 0, "no JSON object"), ('{"a": 1, "a": 2}', 0, "'a' stands there twice")])
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
                            ({**where, "I64": "model-3.safetensors"}, "model-3.safetensors, which is not there|disagree")):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match=sentence):
            weights.read_folder(tmp_path)

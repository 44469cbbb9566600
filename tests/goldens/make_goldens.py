"""The goldens: tiny random models of the reference library, as published, with the logits that it computes.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/goldens/make_goldens.py

Run once, from the repository's root; nothing else needs that library. <family>.safetensors holds the weights
under their published names (model/...), inputs and logits; its metadata the published config.json: the same
bytes every time. tokenizers.json holds a small tokenizer of every kind and its ids of a few texts; their
training breaks ties at random, so it comes out anew. With --exports it checks the other direction and writes
nothing: what weights.py exports, the library loads, with the same logits.

Baichuan and ChatGLM2 are not in the library (their code comes with the weights), so their nearest relatives
compute: Baichuan-7B is LLaMA's block with q, k and v in one tensor. Baichuan-13B is the same with LLaMA's
rotation switched off (every position is 0) and the library's own ALiBi, MPT's, added as a mask. ChatGLM2 is
the library's GLM, which has the same block: interleaved rotation of half a head, grouped queries, biases on
q, k, v alone; it is read under a prefix mask, too.
"""
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]

import checkpoint                               # noqa: E402  (the line above makes these importable)
import common                                   # noqa: E402
import masks                                    # noqa: E402
import model as networks                        # noqa: E402
import tokenizer as ours                        # noqa: E402
import weights                                  # noqa: E402

V, PREFIX, PROMPT = 60, 4, 5                    # tokens of the vocabulary, of a prefix, of a cached prompt
CONFIGS = {
    "gpt2": dict(model_type="gpt2", vocab_size=V, n_layer=2, n_embd=24, n_head=4, n_positions=20,
                 layer_norm_epsilon=1e-5, bos_token_id=1, eos_token_id=1),
    "llama": dict(model_type="llama", vocab_size=V, num_hidden_layers=2, hidden_size=32, hidden_act="silu",
                  num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, rms_norm_eps=1e-5,
                  rope_theta=10000.0, rope_scaling=None, tie_word_embeddings=False, torch_dtype="bfloat16"),
    "baichuan_7b": dict(model_type="baichuan", vocab_size=V, num_hidden_layers=2, hidden_size=32,
                        hidden_act="silu", num_attention_heads=4, intermediate_size=48, rms_norm_eps=1e-6,
                        max_position_embeddings=4096, tie_word_embeddings=False),
    "baichuan_13b": dict(model_type="baichuan", vocab_size=V, num_hidden_layers=2, hidden_size=36,
                         hidden_act="silu", num_attention_heads=6, intermediate_size=32, rms_norm_eps=1e-6,
                         model_max_length=4096, tie_word_embeddings=False),
    "falcon_7b": dict(model_type="falcon", vocab_size=V, num_hidden_layers=2, hidden_size=24, alibi=False,
                      num_attention_heads=3, num_kv_heads=3, multi_query=True, parallel_attn=True, bias=False,
                      new_decoder_architecture=False),
    "falcon_40b": dict(model_type="falcon", vocab_size=V, num_hidden_layers=2, hidden_size=24, alibi=False,
                       num_attention_heads=4, num_kv_heads=2, bias=False, new_decoder_architecture=True),
    "chatglm2": dict(model_type="chatglm", padded_vocab_size=V, num_layers=2, hidden_size=32,
                     num_attention_heads=4, multi_query_attention=True, multi_query_group_num=2,
                     kv_channels=8, ffn_hidden_size=48, layernorm_epsilon=1e-5, add_qkv_bias=True,
                     add_bias_linear=False,
                     rmsnorm=True, post_layer_norm=True, original_rope=True,
                     apply_residual_connection_post_layernorm=False),
    "t5": dict(model_type="t5", vocab_size=V, num_layers=2, d_model=24, num_heads=4, d_kv=4, d_ff=32,
               feed_forward_proj="relu", relative_attention_num_buckets=32, decoder_start_token_id=0),
    "flan_t5": dict(model_type="t5", vocab_size=V, num_layers=2, d_model=20, num_heads=2, d_kv=8, d_ff=28,
                    feed_forward_proj="gated-gelu", relative_attention_num_buckets=32,
                    decoder_start_token_id=0, tie_word_embeddings=False),
    "bart": dict(model_type="bart", vocab_size=V, encoder_layers=2, decoder_layers=2, d_model=20,
                 encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24,
                 max_position_embeddings=24, activation_function="gelu", scale_embedding=False)}


def reference_config(name: str):
    """The library's own configuration, or that of the nearest relative."""
    c = CONFIGS[name]
    if name.startswith("baichuan"):
        return AutoConfig.for_model(**{**c, "model_type": "llama"})
    if name == "chatglm2":
        return AutoConfig.for_model(
            "glm", vocab_size=V, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, head_dim=8,
            num_key_value_heads=2, intermediate_size=48, rms_norm_eps=1e-5, attention_bias=True,
            pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                                             "partial_rotary_factor": 0.5})
    return AutoConfig.for_model(**c)


def reference_model(name: str):
    """Every weight random, so that none can hide; LLaMA's are numbers that bfloat16 has."""
    config = reference_config(name)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").float().eval().requires_grad_(False)
    if name == "flan_t5":                       # published untied, which its configuration no longer says
        model.lm_head.weight = torch.nn.Parameter(torch.empty(V, config.d_model), requires_grad=False)
    for key, weight in model.named_parameters():
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, mean=float(key.endswith("weight")), std=0.3)
        else:
            table = any(word in key for word in ("embed", "wte", "wpe", "shared", "relative"))
            torch.nn.init.normal_(weight, std=1.0 if table else weight.shape[1] ** -0.5)
        weight.copy_(weight.bfloat16() if name == "llama" else weight)
    return model


def published(name: str, model) -> dict[str, torch.Tensor]:
    """The tensors as the family's files have them, needless copies among them."""
    state, tensors = model.state_dict(), {}
    for key, x in state.items():
        if name.startswith("baichuan"):
            if "q_proj" in key:
                x = torch.cat([state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"])
                key = key.replace("q_proj", "W_pack")
            elif "k_proj" in key or "v_proj" in key:
                continue
        if name == "chatglm2":
            if "q_proj" in key:
                x = torch.cat([state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            elif "k_proj" in key or "v_proj" in key:
                continue
            for old, new in (("self_attn.q_proj", "self_attention.query_key_value"),
                             ("self_attn.o_proj", "self_attention.dense"),
                             ("mlp.gate_up_proj", "mlp.dense_h_to_4h"),
                             ("mlp.down_proj", "mlp.dense_4h_to_h"),
                             ("model.embed_tokens", "transformer.embedding.word_embeddings"),
                             ("lm_head", "transformer.output_layer"),
                             ("model.norm", "transformer.encoder.final_layernorm"),
                             ("model.layers", "transformer.encoder.layers")):
                key = key.replace(old, new)
        if name == "gpt2":
            if key == "lm_head.weight":
                continue
            key = key.removeprefix("transformer.")
        if name in ("bart", "t5", "flan_t5") and key.endswith("embed_tokens.weight") and "encoder" not in key:
            continue
        if (name == "t5" or name == "bart") and key == "lm_head.weight":
            continue
        tensors[key] = x.bfloat16() if name == "llama" else x.clone()
    if name == "gpt2":                          # its files hold the causal mask too
        tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 20, 20, dtype=torch.uint8).tril() for i in range(2)}
    if name == "baichuan_7b":
        tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    return tensors


def decoder_case(name: str, model) -> dict[str, torch.Tensor]:
    """Three rows: whole, padded on the left, padded on the right. Cached decoding must agree."""
    B, T = 3, 9
    tokens, real = torch.randint(3, V, (B, T)), torch.ones(B, T, dtype=torch.long)
    real[1, :3], real[2, 7:] = 0, 0
    positions = (real.cumsum(1) - 1).clamp(min=0)
    case = {"tokens": tokens, "real": real, "positions": positions}
    k, lowest = torch.arange(T), torch.finfo(torch.float32).min
    causal = (k[:, None] >= k)[None, None] & (real[:, None, None, :] > 0)

    if name == "baichuan_13b":
        # slope x (k - T + 1); softmax makes no difference between that and slope x (k - q)
        mask = torch.where(causal, build_mpt_alibi_tensor(model.config.num_attention_heads, T), lowest)
        nowhere = torch.zeros_like(positions)
        return {**case, "logits": model(tokens, attention_mask=mask, position_ids=nowhere).logits}
    case["logits"] = model(tokens, attention_mask=real, position_ids=positions).logits
    if name == "chatglm2":
        allowed = causal | ((k < PREFIX)[None, None, None] & (real[:, None, None, :] > 0))
        mask = torch.where(allowed, 0.0, lowest)
        case["prefix_logits"] = model(tokens, attention_mask=mask, position_ids=positions).logits
    out = model(tokens[:, :PROMPT], attention_mask=real[:, :PROMPT], position_ids=positions[:, :PROMPT],
                use_cache=True)
    for t in range(PROMPT, T):
        out = model(tokens[:, t:t + 1], attention_mask=real[:, :t + 1], position_ids=positions[:, t:t + 1],
                    past_key_values=out.past_key_values, use_cache=True)
        seen = real[:, t] > 0
        torch.testing.assert_close(out.logits[seen, -1], case["logits"][seen, t], atol=1e-4, rtol=0)
    return case


def encdec_case(name: str, model) -> dict[str, torch.Tensor]:
    """Sources of unequal length; the decoder reads given tokens. Cached decoding must agree."""
    B, S, T = 3, 24, 20                         # far enough apart for T5's wider buckets
    source, real = torch.randint(3, V, (B, S)), torch.ones(B, S, dtype=torch.long)
    real[1, 5:], real[2, 20:] = 0, 0
    tokens = torch.randint(3, V, (B, T))
    logits = model(source, attention_mask=real, decoder_input_ids=tokens).logits
    encoded, cache, steps = model.get_encoder()(source, attention_mask=real), None, []
    for t in range(T):
        out = model(encoder_outputs=encoded, attention_mask=real, decoder_input_ids=tokens[:, t:t + 1],
                    past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(steps, dim=1), logits, atol=1e-4, rtol=0)
    return {"source": source, "source_real": real, "tokens": tokens, "logits": logits}


def make(name: str) -> None:
    torch.manual_seed(sorted(CONFIGS).index(name))
    model = reference_model(name)
    case = (encdec_case if model.config.is_encoder_decoder else decoder_case)(name, model)
    tensors = case | {f"model/{key}": x for key, x in published(name, model).items()}
    path = HERE / f"{name}.safetensors"
    weights.write_safetensors(path, tensors, {"config": json.dumps(CONFIGS[name]),
                                              "made_with": f"transformers {transformers.__version__}"})
    size = path.stat().st_size
    print(f"{path.name}: {size:,} bytes, logits with a standard deviation of {case['logits'].std():.2f}")
    assert size <= 100_000


# ---- tokenizers: trained on LICENSE, run by the package `tokenizers` --------------------------------------

TEXTS = ["Return the number of tokens.", "def area(width, height):\n    return width * height",
         "  two  spaces ", "naïve café — 東京 🙂", "it's 12345 o'clock, isn't it?", "", "\n\n\ttab",
         "a </s> b <|end|> <pad>"]
SPECIAL = ["<s>", "<pad>", "</s>", "<|end|>"]


def trained(kind: str) -> Tokenizer:
    """A small tokenizer of the named published kind."""
    byte_bpe = kind in ("gpt2", "bart", "split", "falcon")
    model = models.Unigram() if kind == "t5" else models.BPE(byte_fallback=kind == "llama",
                                                               unk_token="<unk>" if kind == "llama" else None)
    tokenizer = Tokenizer(model)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {"gpt2": plain, "bart": plain, "t5": pre_tokenizers.Metaspace(),
             "split": pre_tokenizers.Sequence([
                 pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\s\p{N}]+|\s+"), behavior="isolated"),
                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
             "falcon": pre_tokenizers.Sequence([pre_tokenizers.Punctuation("contiguous"), plain,
                                                pre_tokenizers.Digits(),
                                                pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")])}
    if kind in words:
        tokenizer.pre_tokenizer = words[kind]
    else:                                       # LLaMA: no words, a space in front, and bytes for the unknown
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                     normalizers.Replace(" ", "▁")])
    llama = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                  decoders.Strip(" ", 1, 0)])
    tokenizer.decoder = (decoders.ByteLevel() if byte_bpe else llama if kind == "llama" else
                         decoders.Metaspace())
    lines = (HERE.parent.parent / "LICENSE").read_text().splitlines()
    text = [line.replace(" ", "▁") for line in lines] if kind == "llama" else lines
    quiet = {"show_progress": False}
    if kind == "t5":
        extra = [f"<extra_id_{i}>" for i in reversed(range(3))]
        trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=["<pad>", "</s>", "<unk>"],
                                          unk_token="<unk>", **quiet)
        tokenizer.train_from_iterator(text, trainer)
        tokenizer.add_special_tokens(extra)
    elif kind == "llama":
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=pieces, **quiet)
        tokenizer.train_from_iterator(text, trainer)
    else:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=SPECIAL,
                                      **quiet)
        tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def tokenizer_files(kind: str) -> tuple[dict, list[list[int]]]:
    """{file: content} as published, and the ids of TEXTS, in which nothing is taken for a special token."""
    content = json.loads(trained(kind).to_str())
    if kind == "llama":                         # only three of them are special
        content["added_tokens"] = content["added_tokens"][:3]
    model, files = content["model"], {"tokenizer.json": content}
    if kind == "bart":                          # ids in another order than that of the merges
        ordinary = [token for token in model["vocab"] if token not in SPECIAL]
        shuffled = [ordinary[i] for i in torch.randperm(len(ordinary)).tolist()]
        model["vocab"] = {token: i for i, token in enumerate(SPECIAL[:3] + shuffled + SPECIAL[3:])}
        content["added_tokens"] = []
    if kind in ("gpt2", "bart"):
        merges = [" ".join(merge) for merge in model["merges"]]
        files = {"vocab.json": model["vocab"], "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n"}
    bare = json.loads(json.dumps(content)) | {"added_tokens": []}
    if kind == "t5":                            # else it would find </s> in its vocabulary
        bare["model"]["vocab"][1][0] = "\0"
        bare["model"]["vocab"][0][0] = "\0\0"
    reference = Tokenizer.from_str(json.dumps(bare))
    return files, [reference.encode(text, add_special_tokens=False).ids for text in TEXTS]


def make_tokenizers() -> None:
    kinds, path = {}, HERE / "tokenizers.json"
    for kind in ("gpt2", "bart", "split", "falcon", "llama", "t5"):
        files, ids = tokenizer_files(kind)
        kinds[kind] = {"files": files, "ids": ids}
    path.write_text(json.dumps({"texts": TEXTS, "kinds": kinds}, ensure_ascii=False, separators=(",", ":")))
    print(f"{path.name}: {path.stat().st_size:,} bytes")
    assert path.stat().st_size <= 100_000


# ---- the other direction -----------------------------------------------------------------------------------

EXPORTS = {"gpt2": ("gpt2", dict(max_positions=40)), "llama2-7b": ("llama", dict(kv_heads=2)),
           "t5-small": ("t5", {}), "flan-t5-small": ("t5", {})}


def check_exports() -> None:
    """A random model of ours, exported, read by the library: the same logits."""
    for name, (layout, more) in EXPORTS.items():
        config = networks.preset(name, vocab=300, layers=2, width=32, heads=4, **more)
        model = networks.build(config).requires_grad_(False)
        for key, weight in model.named_parameters():
            torch.nn.init.normal_(weight, mean=float(weight.dim() == 1 and key.endswith("weight")), std=0.3)
        with tempfile.TemporaryDirectory() as place:
            run, out = common.Run(Path(place, "run"), torch.device("cpu"), torch.float32), Path(place, "out")
            settings = weights.Config("export", str(run.folder), str(out), layout)
            ranks = {bytes([byte]): byte for byte in range(180)}
            checkpoint.open_run(run, settings, ours.Tokenizer(ranks), set())
            checkpoint.save(run, 7, settings, config, model=model)
            weights.main(settings)
            auto = AutoModelForSeq2SeqLM if layout == "t5" else AutoModelForCausalLM
            reference, told = auto.from_pretrained(out, output_loading_info=True)
        assert not any(told[key] for key in told if key != "missing_keys") and not told["missing_keys"], told
        tokens, positions = torch.randint(300, (2, 9)), torch.arange(9).expand(2, 9)
        causal = masks.dense(masks.causal, 2, 9, 9)
        cross = ()
        if layout == "t5":
            everything = masks.dense(masks.bidirectional, 2, 9, 9)
            cross = (model.encode(tokens, positions, everything), everything)
        mine = model.logits(model.decode(tokens, positions, causal, *cross))
        theirs = reference.eval()(tokens, **({"decoder_input_ids": tokens} if cross else {})).logits
        difference = float((mine - theirs).abs().max() / theirs.std())
        print(f"{name} exported as {layout}: logits differ by {difference:.1e} of their spread")
        assert difference <= 1e-4


if __name__ == "__main__":
    with torch.no_grad():
        torch.manual_seed(0)
        if "--exports" in sys.argv:
            sys.exit(check_exports())
        make_tokenizers()
        for name in CONFIGS:
            make(name)

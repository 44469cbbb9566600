"""The layouts in which the families are published: what config.json says, and what their tensors are called.

A layout reads config.json into a ModelConfig and is a table from our modules to the published ones. The rest
is in weights.py; a new family, or another author's names for it, is a new row of LAYOUTS.
"""
import dataclasses
from typing import Callable, NamedTuple

import torch
from torch import Tensor

from errors import UserError
from model import ModelConfig
from presets import BAICHUAN, BART, CHATGLM, CHATGLM2, FALCON, FLAN_T5, GPT2, LLAMA, T5, sizes

# ---- config.json -> ModelConfig ----------------------------------------------------------------------------
# `c` is the parsed config.json. What it leaves out has the default of the published code.

def only(c: dict, **built) -> None:
    """Settings that must be as they are built here: a value, or a tuple of them, or left out."""
    for key, values in built.items():
        values = values if isinstance(values, tuple) else (values,)
        if c.get(key, values[0]) not in values:
            raise UserError(f"config.json has {key} {c[key]!r}; built here is "
                            f"{' or '.join(map(repr, values))} alone")


def rope(c: dict) -> dict:
    """rope_theta, alone or among rope_parameters. Frequencies scaled for longer texts are not built."""
    parameters = c.get("rope_parameters") or {}
    only(parameters, rope_type="default")
    only(c, rope_scaling=None)
    return {"rope_theta": 1.0 * (c.get("rope_theta") or parameters.get("rope_theta", 10000.0))}


def sized(variants: dict, *layers_width_heads, **more) -> ModelConfig:
    return ModelConfig(**sizes(variants, *layers_width_heads, **more))


def read_gpt2(c: dict) -> ModelConfig:
    only(c, activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=True,
         scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return sized(GPT2, c["n_layer"], c["n_embd"], c["n_head"], vocab=c["vocab_size"],
                 ffn_width=c.get("n_inner") or 0, max_positions=c["n_positions"],
                 norm_eps=c.get("layer_norm_epsilon", 1e-5), tied=c.get("tie_word_embeddings", True))


def read_llama(c: dict) -> ModelConfig:
    only(c, hidden_act="silu", mlp_bias=c.get("attention_bias", False))
    heads = c["num_attention_heads"]
    return sized(LLAMA, c["num_hidden_layers"], c["hidden_size"], heads, vocab=c["vocab_size"],
                 kv_heads=c.get("num_key_value_heads") or heads, head_width=c.get("head_dim") or 0,
                 ffn_width=c["intermediate_size"], norm_eps=c.get("rms_norm_eps", 1e-6),
                 tied=c.get("tie_word_embeddings", False),
                 bias="all" if c.get("attention_bias") else "none", **rope(c))


def read_baichuan(c: dict) -> ModelConfig:
    """The 7B model has max_position_embeddings; the 13B model has ALiBi and no such key."""
    if "z_loss_weight" in c:
        raise UserError("this is Baichuan 2, whose unembedding is normalised; built here is Baichuan")
    only(c, hidden_act="silu", tie_word_embeddings=False)
    positions = rope(c) if "max_position_embeddings" in c else {"positions": "alibi"}
    return sized(BAICHUAN, c["num_hidden_layers"], c["hidden_size"], c["num_attention_heads"],
                 vocab=c["vocab_size"], ffn_width=c["intermediate_size"],
                 norm_eps=c.get("rms_norm_eps", 1e-6), **positions)


def read_falcon(c: dict) -> ModelConfig:
    """Falcon-40B's keys and values are grouped; for 7B multi_query counts, whatever num_kv_heads says."""
    heads, layers = c.get("num_attention_heads") or c["n_head"], c.get("num_hidden_layers") or c["n_layer"]
    grouped = c.get("new_decoder_architecture", "n_head_kv" in c)
    only(c, alibi=False, bias=False, activation="gelu", **({} if grouped else
                                                           {"multi_query": True, "parallel_attn": True}))
    kv_heads = (c.get("num_kv_heads") or c.get("n_head_kv") or heads) if grouped else 1
    two_norms = grouped and (c.get("num_ln_in_parallel_attn") or 2) == 2
    return sized(FALCON, layers, c["hidden_size"], heads, vocab=c["vocab_size"], kv_heads=kv_heads,
                 head_width=0, ffn_width=c.get("ffn_hidden_size") or 0,
                 norm_eps=c.get("layer_norm_epsilon", 1e-5), tied=c.get("tie_word_embeddings", True),
                 block="parallel_two_norms" if two_norms else "parallel", **rope(c))


def read_chatglm(c: dict) -> ModelConfig:
    """ChatGLM-6B. Its first release had image tokens in the vocabulary, and says nothing of [gMASK]."""
    only(c, position_encoding_2d=True, pre_seq_len=None, quantization_bit=0, tie_word_embeddings=True)
    if "gmask_token_id" not in c:
        raise UserError("config.json has no gmask_token_id: this is ChatGLM-6B's first release; take a later")
    return sized(CHATGLM, c["num_layers"], c["hidden_size"], c["num_attention_heads"], vocab=c["vocab_size"],
                 ffn_width=c["inner_hidden_size"], norm_eps=c.get("layernorm_epsilon", 1e-5))


def read_chatglm2(c: dict) -> ModelConfig:
    """Without multi_query_attention, which is the default, q, k and v would lie side by side in each head."""
    only({"multi_query_attention": False, **c}, rmsnorm=True, add_bias_linear=False, post_layer_norm=True,
         apply_residual_connection_post_layernorm=False, rope_ratio=1, tie_word_embeddings=False,
         multi_query_attention=True)
    return sized(CHATGLM2, c["num_layers"], c["hidden_size"], c["num_attention_heads"],
                 vocab=c["padded_vocab_size"], kv_heads=c["multi_query_group_num"],
                 head_width=c["kv_channels"], ffn_width=c["ffn_hidden_size"],
                 norm_eps=c.get("layernorm_epsilon", 1e-5), bias="qkv" if c.get("add_qkv_bias") else "none")


def read_t5(c: dict) -> ModelConfig:
    """Tied embeddings and logits / sqrt(width) go together: T5 has both, T5 1.1 and Flan-T5 neither."""
    only(c, feed_forward_proj=("relu", "gated-gelu"), relative_attention_num_buckets=32,
         relative_attention_max_distance=128, num_decoder_layers=(None, c["num_layers"]))
    gated, tied = c.get("feed_forward_proj") == "gated-gelu", c.get("tie_word_embeddings", True)
    tied = c.get("scale_decoder_outputs", tied)          # newer files always say that embeddings are tied
    return sized(FLAN_T5 if gated else T5, c["num_layers"], c["d_model"], c["num_heads"],
                 vocab=c["vocab_size"], head_width=c["d_kv"], ffn_width=c["d_ff"],
                 norm_eps=c.get("layer_norm_epsilon", 1e-6), tied=tied, scaled_logits=tied)


def read_bart(c: dict) -> ModelConfig:
    only(c, activation_function="gelu", scale_embedding=False, normalize_before=False,
         normalize_embedding=True, add_final_layer_norm=False, tie_word_embeddings=True,
         decoder_layers=c["encoder_layers"],
         decoder_attention_heads=c["encoder_attention_heads"], decoder_ffn_dim=c["encoder_ffn_dim"])
    return sized(BART, c["encoder_layers"], c["d_model"], c["encoder_attention_heads"], vocab=c["vocab_size"],
                 ffn_width=c["encoder_ffn_dim"], max_positions=c["max_position_embeddings"])


# ---- ModelConfig -> config.json ----------------------------------------------------------------------------

def write_gpt2(config: ModelConfig) -> dict:
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": config.vocab,
            "n_layer": config.layers, "n_embd": config.width, "n_head": config.heads,
            "n_inner": config.ffn_width, "n_positions": max(1, config.max_positions),
            "layer_norm_epsilon": config.norm_eps, "activation_function": "gelu_new",
            "tie_word_embeddings": config.tied}


def write_llama(config: ModelConfig) -> dict:
    biases = config.bias == "all"
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": config.vocab,
            "num_hidden_layers": config.layers, "hidden_size": config.width, "hidden_act": "silu",
            "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_width, "intermediate_size": config.ffn_width,
            "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "attention_bias": biases,
            "mlp_bias": biases, "tie_word_embeddings": config.tied}


def write_t5(config: ModelConfig) -> dict:
    return {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": config.vocab,
            "num_layers": config.layers, "num_decoder_layers": config.layers, "d_model": config.width,
            "num_heads": config.heads, "d_kv": config.head_width, "d_ff": config.ffn_width,
            "feed_forward_proj": "relu" if config.ffn == "relu" else "gated-gelu",
            "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
            "layer_norm_epsilon": config.norm_eps, "tie_word_embeddings": config.tied,
            "is_encoder_decoder": True}


# ---- names: our modules -> published ones, * for the layer, {a,b} for several that we have in one ----------

def layers(ours: str, theirs: str, **names: str) -> dict[str, str]:
    """The modules of a layer; __ stands for a dot."""
    names = {name.replace("__", "."): value for name, value in names.items()}
    return {f"{ours}.blocks.*.{name}": f"{theirs}.*.{value}" for name, value in names.items()}


def names_gpt2(config: ModelConfig) -> dict[str, str]:
    return {"embedding": "wte", "unembedding": "lm_head", "decoder.positions": "wpe", "decoder.norm": "ln_f",
            **layers("decoder", "h", attention_norm="ln_1", attention__qkv="attn.c_attn",
                     attention__out="attn.c_proj", ffn_norm="ln_2", ffn__inner="mlp.c_fc",
                     ffn__out="mlp.c_proj")}


def names_llama(config: ModelConfig) -> dict[str, str]:
    return {"embedding": "model.embed_tokens", "unembedding": "lm_head", "decoder.norm": "model.norm",
            **layers("decoder", "model.layers", attention_norm="input_layernorm",
                     attention__qkv="self_attn.{q,k,v}_proj", attention__out="self_attn.o_proj",
                     ffn_norm="post_attention_layernorm", ffn__inner="mlp.{gate,up}_proj",
                     ffn__out="mlp.down_proj")}


def names_baichuan(config: ModelConfig) -> dict[str, str]:
    return {**names_llama(config), **layers("decoder", "model.layers", attention__qkv="self_attn.W_pack")}


def names_falcon(config: ModelConfig) -> dict[str, str]:
    one_norm = config.block == "parallel"
    return {"embedding": "word_embeddings", "unembedding": "lm_head", "decoder.norm": "ln_f",
            **layers("decoder", "h", attention_norm="input_layernorm" if one_norm else "ln_attn",
                     ffn_norm="ln_mlp", attention__qkv="self_attention.query_key_value",
                     attention__out="self_attention.dense", ffn__inner="mlp.dense_h_to_4h",
                     ffn__out="mlp.dense_4h_to_h")}


def names_chatglm(config: ModelConfig) -> dict[str, str]:
    return {"embedding": "word_embeddings", "unembedding": "lm_head", "decoder.norm": "final_layernorm",
            **layers("decoder", "layers", attention_norm="input_layernorm",
                     attention__qkv="attention.query_key_value", attention__out="attention.dense",
                     ffn_norm="post_attention_layernorm", ffn__inner="mlp.dense_h_to_4h",
                     ffn__out="mlp.dense_4h_to_h")}


def names_chatglm2(config: ModelConfig) -> dict[str, str]:
    return {"embedding": "embedding.word_embeddings", "unembedding": "output_layer",
            "decoder.norm": "encoder.final_layernorm",
            **layers("decoder", "encoder.layers", attention_norm="input_layernorm",
                     attention__qkv="self_attention.query_key_value", attention__out="self_attention.dense",
                     ffn_norm="post_attention_layernorm", ffn__inner="mlp.dense_h_to_4h",
                     ffn__out="mlp.dense_4h_to_h")}


def names_t5(config: ModelConfig) -> dict[str, str]:
    """The table of relative positions is kept in the first layer and used in all."""
    names = {"embedding": "shared", "unembedding": "lm_head"}
    inner = "wi" if config.ffn == "relu" else "wi_{0,1}"
    for stack, last in (("encoder", 1), ("decoder", 2)):
        names |= {f"{stack}.norm": f"{stack}.final_layer_norm",
                  f"{stack}.relative": f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias",
                  **layers(stack, f"{stack}.block", attention_norm="layer.0.layer_norm",
                           attention__qkv="layer.0.SelfAttention.{q,k,v}",
                           attention__out="layer.0.SelfAttention.o", ffn_norm=f"layer.{last}.layer_norm",
                           ffn__inner=f"layer.{last}.DenseReluDense.{inner}",
                           ffn__out=f"layer.{last}.DenseReluDense.wo")}
    return names | layers("decoder", "decoder.block", cross_norm="layer.1.layer_norm",
                          cross__qkv="layer.1.EncDecAttention.{q,k,v}",
                          cross__out="layer.1.EncDecAttention.o")


def names_bart(config: ModelConfig) -> dict[str, str]:
    names = {"embedding": "shared"}
    for stack in ("encoder", "decoder"):
        names |= {f"{stack}.positions": f"{stack}.embed_positions",
                  f"{stack}.embedding_norm": f"{stack}.layernorm_embedding",
                  **layers(stack, f"{stack}.layers", attention_norm="self_attn_layer_norm",
                           attention__qkv="self_attn.{q,k,v}_proj", attention__out="self_attn.out_proj",
                           ffn_norm="final_layer_norm", ffn__inner="fc1", ffn__out="fc2")}
    return names | layers("decoder", "decoder.layers", cross_norm="encoder_attn_layer_norm",
                          cross__qkv="encoder_attn.{q,k,v}_proj", cross__out="encoder_attn.out_proj")


# ---- layouts -----------------------------------------------------------------------------------------------

def transposed(name: str, x: Tensor, config: ModelConfig) -> Tensor:
    """GPT-2 keeps its layers' matrices as (in, out)."""
    return x.T if x.dim() == 2 and name.startswith("h.") else x


def ungrouped(name: str, x: Tensor, config: ModelConfig) -> Tensor:
    """Falcon has the query heads of a group, its key and its value side by side; we have all queries, all
    keys, all values. With a single group, as in 7B, that is the same. In ChatGLM-6B each head is a group.
    """
    if "query_key_value" not in name:
        return x
    rows = torch.arange(len(x)).view(config.kv_heads, -1, config.head_width)
    return x[torch.cat([part.flatten() for part in (rows[:, :-2], rows[:, -2], rows[:, -1])])]


class Layout(NamedTuple):
    """How a family is published. `left_out`: pattern of tensors that are not read, and what they must equal:
    one of our tensors, "zeros", or "" for constants that the model computes itself.
    """
    read_config: Callable[[dict], ModelConfig]
    names: Callable[[ModelConfig], dict[str, str]]
    left_out: dict[str, str]
    prefix: str = ""                        # may stand before all names or be left out
    turn: Callable = lambda name, x, config: x             # a published tensor as we have it
    write_config: Callable[[ModelConfig], dict] | None = None


TIED = {r"lm_head\.weight": "embedding.weight"}             # said twice by some files
ROTARY = {r"(.*\.)?(rotary_emb|rotary_pos_emb)\.inv_freq": ""}
COPIES = {**TIED, r"(encoder|decoder)\.embed_tokens\.weight": "embedding.weight"}
# old T5 files hold a table for the cross-attention, which has no positions
CROSS_TABLE = {r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight": ""}
LAYOUTS = {
    "gpt2": Layout(read_gpt2, names_gpt2, {**TIED, r"h\.\d+\.attn\.(bias|masked_bias)": ""}, "transformer.",
                   transposed, write_gpt2),
    "llama": Layout(read_llama, names_llama, {**TIED, **ROTARY},
                    write_config=write_llama),
    "baichuan": Layout(read_baichuan, names_baichuan, ROTARY),
    "falcon": Layout(read_falcon, names_falcon, {**TIED, **ROTARY}, "transformer.", ungrouped),
    "chatglm": Layout(read_chatglm, names_chatglm, {**TIED, **ROTARY}, "transformer.", ungrouped),
    "chatglm2": Layout(read_chatglm2, names_chatglm2, ROTARY, "transformer."),
    "t5": Layout(read_t5, names_t5, {**COPIES, **CROSS_TABLE}, write_config=write_t5),
    "bart": Layout(read_bart, names_bart, {**COPIES, "final_logits_bias": "zeros",
                                           r"(encoder|decoder)\.version": ""}, "model.")}
MODEL_TYPES = {"gpt2": "gpt2", "llama": "llama", "baichuan": "baichuan", "falcon": "falcon", "t5": "t5",
               "RefinedWeb": "falcon", "RefinedWebModel": "falcon", "chatglm": "chatglm2", "bart": "bart"}


def read_config(c: dict) -> tuple[Layout, ModelConfig]:
    """The layout and the network of a config.json."""
    kind = c.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise UserError(f"config.json has model_type {kind!r}; known are {', '.join(MODEL_TYPES)}")
    first_generation = kind == "chatglm" and "position_encoding_2d" in c     # ChatGLM2's type too
    layout = LAYOUTS["chatglm" if first_generation else MODEL_TYPES[kind]]
    try:
        config = layout.read_config(c)
    except KeyError as error:
        raise UserError(f"config.json, of model_type {kind!r}, has no {error}") from None
    except (TypeError, AttributeError) as error:
        raise UserError(f"config.json, of model_type {kind!r}, has a wrong value: {error}") from None
    wrong = [f"{field.name} {getattr(config, field.name)!r}" for field in dataclasses.fields(config)
             if type(getattr(config, field.name)) not in (field.type, *[int] * (field.type is float))]
    if wrong:
        raise UserError(f"config.json, of model_type {kind!r}, makes {', '.join(wrong)} of its values")
    return layout, config

"""What a network is made of (ModelConfig), and the published families: which variants and sizes each one has.

    python presets.py                   what differs between the families, as a Markdown table

Sources are the papers and the released configurations; comments say where they leave something open, or we
differ.
"""
import difflib
import math
from dataclasses import dataclass, replace

from errors import UserError, at_least

STRUCTURES = ("causal", "prefix", "encdec")
PLAIN, GATED = ("relu", "gelu", "gelu_tanh"), ("geglu", "geglu_tanh", "swiglu")
CHOICES = {"structure": STRUCTURES, "norm": ("rms", "layer"),
           "norm_place": ("pre", "post", "deepnorm", "normed_residual"),
           "positions": ("rope", "rope2d", "learned", "relative", "alibi"), "ffn": PLAIN + GATED,
           "block": ("serial", "parallel", "parallel_two_norms"), "bias": ("none", "qkv", "all"),
           "init": ("zero", "fan_in", "normal", "deepnorm")}


@dataclass
class ModelConfig:
    """Sizes and variants of a network. encdec: `layers` layers in the encoder, as many in the decoder."""
    structure: str = "causal"
    vocab: int = 2048
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2              # grouped-query attention: `heads` share this many keys and values
    width: int = 128
    ffn_width: int = 0             # 0: 4 x width; gated 8/3 x width, rounded up to a multiple of 32
    head_width: int = 0            # 0: width / heads
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    norm: str = "rms"              # rms, layer: LayerNorm, which also subtracts the mean
    norm_bias: bool = False        # LayerNorm adds a bias
    norm_place: str = "pre"        # where a block normalises, see Block: pre, post, deepnorm, normed_residual
    final_norm: bool = True        # normalise the last block's output
    embedding_norm: bool = False   # normalise what enters the first block
    positions: str = "rope"        # rope, rope2d: two positions a token, learned, relative: T5's bias, alibi
    rope_share: float = 1.0        # rotate this share of every head, and let the rest pass
    rope_interleaved: bool = False  # rotate neighbours (2i, 2i + 1), not (i, i + half)
    max_positions: int = 0         # learned: the longest sequence
    position_offset: int = 0       # learned: position 0 reads this row of the table
    ffn: str = "swiglu"            # relu, gelu, gelu_tanh; gated: geglu, geglu_tanh, swiglu
    block: str = "serial"          # serial, parallel: attention and ffn read one norm, parallel_two_norms
    bias: str = "none"             # which matrices add a bias: none, qkv, all
    tied: bool = False             # the embedding is the unembedding too
    scaled_attention: bool = True  # scores are divided by the root of head_width
    scaled_logits: bool = False    # logits are divided by the root of width
    embedding_gradient: float = 1.0  # share of the gradient that reaches the embedding
    init: str = "zero"             # zero, fan_in, normal, deepnorm, see initial_std

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        at_least(1, self, "vocab", "layers", "heads", "kv_heads", "width")
        at_least(0, self, "ffn_width", "head_width", "max_positions", "position_offset")
        for name in ("rope_share", "embedding_gradient"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must lie above 0 and up to 1")
        if not self.head_width and self.width % self.heads:
            raise UserError(f"heads {self.heads} must divide width {self.width}")
        default = 32 * math.ceil(8 * self.width / 3 / 32) if self.ffn in GATED else 4 * self.width
        self.ffn_width = self.ffn_width or default
        self.head_width = self.head_width or self.width // self.heads
        rope = self.positions in ("rope", "rope2d")
        rotated = self.head_width / 2 if self.positions == "rope2d" else self.head_width * self.rope_share
        for wrong, sentence in (
            (self.heads % self.kv_heads, f"kv_heads {self.kv_heads} must divide heads {self.heads}"),
            (rope and rotated % 2, f"heads {self.heads} have head_width {self.head_width}; positions "
                                   f"{self.positions!r} turn pairs, and {rotated:g} coordinates are none"),
            (self.positions != "rope" and (self.rope_share < 1 or self.rope_interleaved),
             f"rope_share and rope_interleaved are for positions 'rope', not for {self.positions!r}"),
            ((self.positions == "learned") != (self.max_positions > 0),
             f"max_positions is {self.max_positions}, positions {self.positions!r}: only 'learned' wants it"),
            (self.norm_bias and self.norm == "rms", "norm_bias is True, but norm 'rms' has no bias"),
            (self.block != "serial" and (self.norm_place != "pre" or self.structure == "encdec"),
             f"block {self.block!r} is for decoders with norm_place 'pre'"),
            (self.positions == "rope2d" and self.structure == "encdec",
             "positions 'rope2d' is for decoders, where source and target share a row"),
        ):
            if wrong:
                raise UserError(sentence)


# ---- the families ------------------------------------------------------------------------------------------

GPT2 = dict(structure="causal", vocab=50257, norm="layer", norm_bias=True, positions="learned",
            max_positions=1024, ffn="gelu_tanh", bias="all", tied=True, init="normal")
GPT3 = dict(GPT2, max_positions=2048)       # left out: every other layer of it attends to a local band alone
LLAMA = dict(structure="causal", vocab=32000, norm_eps=1e-6, ffn="swiglu", init="normal")
LLAMA2 = dict(LLAMA, norm_eps=1e-5)
BAICHUAN = dict(LLAMA, vocab=64000)
# the embedding has variance 1 and is the unembedding too, hence logits / sqrt(width) (PaLM, section 5)
PALM = dict(structure="causal", vocab=256000, kv_heads=1, head_width=256, norm="layer", norm_eps=1e-6,
            ffn="swiglu", block="parallel", tied=True, scaled_logits=True, init="fan_in")
T5 = dict(structure="encdec", vocab=32128, head_width=64, norm_eps=1e-6, positions="relative", ffn="relu",
          tied=True, scaled_attention=False, scaled_logits=True, init="fan_in")
FLAN_T5 = dict(T5, ffn="geglu_tanh", tied=False, scaled_logits=False)        # T5 1.1, taught to follow
BART = dict(structure="encdec", vocab=50265, norm="layer", norm_bias=True, norm_place="post",
            final_norm=False, embedding_norm=True, positions="learned", max_positions=1024,
            position_offset=2, ffn="gelu", bias="all", tied=True, init="normal")
FALCON = dict(structure="causal", vocab=65024, head_width=64, norm="layer", norm_bias=True, ffn="gelu",
              tied=True, init="normal")
CHATGLM = dict(structure="prefix", vocab=130528, norm="layer", norm_bias=True, norm_place="normed_residual",
               positions="rope2d", ffn="gelu_tanh", bias="all", tied=True, embedding_gradient=0.1,
               init="deepnorm")
# Causal, though its base was pretrained with GLM's prefix mask: in a conversation every answer is followed by
# more, and under a prefix mask each of n turns is an example of its own and no cache survives the next turn.
CHATGLM2 = dict(structure="causal", vocab=65024, rope_share=0.5, rope_interleaved=True, ffn="swiglu",
                bias="qkv", init="normal")
# GLM-130B as in its paper, section 2.1; the released weights have one LayerNorm more, on the embedding.
GLM_130B = dict(structure="prefix", vocab=150528, norm="layer", norm_bias=True, norm_place="deepnorm",
                final_norm=False, ffn="geglu", bias="all", tied=True, embedding_gradient=0.1, init="deepnorm")


def sizes(variants: dict, layers: int, width: int, heads: int, **more) -> dict:
    """One preset: multi-head attention, unless kv_heads says otherwise."""
    return {"kv_heads": heads, **variants, "layers": layers, "width": width, "heads": heads, **more}


PRESETS = {
    "gpt2": sizes(GPT2, 12, 768, 12),
    "gpt2-medium": sizes(GPT2, 24, 1024, 16),
    "gpt2-large": sizes(GPT2, 36, 1280, 20),
    "gpt2-xl": sizes(GPT2, 48, 1600, 25),
    "gpt3-125m": sizes(GPT3, 12, 768, 12),
    "gpt3-350m": sizes(GPT3, 24, 1024, 16),
    "gpt3-760m": sizes(GPT3, 24, 1536, 16),
    "gpt3-1.3b": sizes(GPT3, 24, 2048, 16),          # the paper's table says 24 heads of 128: wider than 2048
    "gpt3-2.7b": sizes(GPT3, 32, 2560, 32),
    "gpt3-6.7b": sizes(GPT3, 32, 4096, 32),
    "gpt3-13b": sizes(GPT3, 40, 5120, 40),           # the paper's table says 5140, which 40 does not divide
    "gpt3-175b": sizes(GPT3, 96, 12288, 96),
    "llama-7b": sizes(LLAMA, 32, 4096, 32, ffn_width=11008),
    "llama-13b": sizes(LLAMA, 40, 5120, 40, ffn_width=13824),
    "llama-30b": sizes(LLAMA, 60, 6656, 52, ffn_width=17920),                # the paper calls it 33B
    "llama-65b": sizes(LLAMA, 80, 8192, 64, ffn_width=22016),
    "llama2-7b": sizes(LLAMA2, 32, 4096, 32, ffn_width=11008),
    "llama2-13b": sizes(LLAMA2, 40, 5120, 40, ffn_width=13824),
    "llama2-70b": sizes(LLAMA2, 80, 8192, 64, ffn_width=28672, kv_heads=8),
    "baichuan-7b": sizes(BAICHUAN, 32, 4096, 32, ffn_width=11008),
    "baichuan-13b": sizes(BAICHUAN, 40, 5120, 40, ffn_width=13696, positions="alibi"),
    "falcon-7b": sizes(FALCON, 32, 4544, 71, kv_heads=1, block="parallel"),
    "falcon-40b": sizes(FALCON, 60, 8192, 128, kv_heads=8, block="parallel_two_norms"),
    "palm-8b": sizes(PALM, 32, 4096, 16, ffn_width=16384),
    "palm-62b": sizes(PALM, 64, 8192, 32, ffn_width=32768),
    "palm-540b": sizes(PALM, 118, 18432, 48, ffn_width=73728),
    "u-palm-540b": sizes(PALM, 118, 18432, 48, ffn_width=73728, structure="prefix"),
    "chatglm-6b": sizes(CHATGLM, 28, 4096, 32),
    "chatglm2-6b": sizes(CHATGLM2, 28, 4096, 32, ffn_width=13696, kv_heads=2),
    "glm-130b": sizes(GLM_130B, 70, 12288, 96, ffn_width=32768),
    "t5-small": sizes(T5, 6, 512, 8, ffn_width=2048),
    "t5-base": sizes(T5, 12, 768, 12, ffn_width=3072),
    "t5-large": sizes(T5, 24, 1024, 16, ffn_width=4096),
    "t5-3b": sizes(T5, 24, 1024, 32, ffn_width=16384, head_width=128),
    "t5-11b": sizes(T5, 24, 1024, 128, ffn_width=65536, head_width=128),
    "flan-t5-small": sizes(FLAN_T5, 8, 512, 6, ffn_width=1024),
    "flan-t5-base": sizes(FLAN_T5, 12, 768, 12, ffn_width=2048),
    "flan-t5-large": sizes(FLAN_T5, 24, 1024, 16, ffn_width=2816),
    "flan-t5-xl": sizes(FLAN_T5, 24, 2048, 32, ffn_width=5120),
    "flan-t5-xxl": sizes(FLAN_T5, 24, 4096, 64, ffn_width=10240),
    "bart-base": sizes(BART, 6, 768, 12, ffn_width=3072),
    "bart-large": sizes(BART, 12, 1024, 16, ffn_width=4096),
}


def preset(name: str, **changes) -> ModelConfig:
    """A published network, such as "llama2-7b"; in other sizes by preset("t5-small", layers=2, width=64)."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.8)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(PRESETS)}"
        raise UserError(f"there is no preset {name!r}; {hint}")
    return scaled(ModelConfig(**PRESETS[name]), **changes)


def preset_for(name: str, structure: str, context: int, **changes) -> ModelConfig:
    """A preset to be trained here: another structure if one is named, learned positions for this context."""
    config = preset(name)
    if structure:
        changes["structure"] = structure
    if config.positions == "learned":
        changes["max_positions"] = 2 * context          # a source and its target may each fill the context
    return scaled(config, **changes)


def scaled(config: ModelConfig, **changes) -> ModelConfig:
    """The same variants in other sizes. What is not given keeps its proportion: heads, ffn_width and the
    width of all heads together to width, kv_heads to heads.
    """
    if not {"width", "heads"} & set(changes):
        return replace(config, **changes)
    ratio = changes.get("width", config.width) / config.width
    heads = changes.get("heads") or max(1, round(config.heads * ratio))
    head_width = config.head_width * config.heads / heads * ratio
    others = {"heads": heads, "head_width": max(4, 4 * round(head_width / 4)),
              "kv_heads": math.gcd(heads, max(1, config.kv_heads * heads // config.heads)),
              "ffn_width": max(8, 8 * round(config.ffn_width * ratio / 8))}
    return replace(config, **{**others, **changes})


# ---- the table of differences ------------------------------------------------------------------------------

FAMILIES = {"GPT-2": "gpt2", "GPT-3": "gpt3-", "LLaMA": "llama-", "LLaMA 2": "llama2-",
            "Baichuan-7B": "baichuan-7b", "Baichuan-13B": "baichuan-13b", "Falcon-7B": "falcon-7b",
            "Falcon-40B": "falcon-40b", "PaLM": "palm-", "U-PaLM": "u-palm-", "ChatGLM-6B": "chatglm-6b",
            "ChatGLM2-6B": "chatglm2-6b", "GLM-130B": "glm-130b", "T5": "t5-", "Flan-T5": "flan-t5-",
            "BART": "bart-"}                          # a family: the presets whose names begin so
WORDS = {"causal": "causal decoder", "prefix": "prefix decoder", "encdec": "encoder-decoder",
         "rms": "RMSNorm", "layer": "LayerNorm", "pre": "before", "post": "after",
         "deepnorm": "after (DeepNorm)", "normed_residual": "before, residual too",
         "rope": "RoPE", "rope2d": "2-D RoPE", "learned": "learned", "relative": "relative bias",
         "alibi": "ALiBi", "relu": "ReLU", "gelu": "GELU", "gelu_tanh": "GELU (tanh)", "geglu": "GEGLU",
         "geglu_tanh": "GEGLU (tanh)", "swiglu": "SwiGLU", "serial": "serial",
         "parallel": "parallel, one norm", "parallel_two_norms": "parallel, two norms", "none": "none",
         "qkv": "q, k, v", "all": "all"}


def differences(config) -> dict[str, str]:
    """{column of the table: what this config has there}"""
    rope = " on half of the head" * (config.rope_share == 0.5) + ", interleaved" * config.rope_interleaved
    query, kv = config.heads, config.kv_heads
    kind = "multi-head" if kv == query else "multi-query" if kv == 1 else f"grouped, {query} : {kv}"
    norm = WORDS[config.norm] + " without bias" * (config.norm == "layer" and not config.norm_bias)
    extra = ", after the embedding" * config.embedding_norm + ", none at the end" * (not config.final_norm)
    return {"structure": WORDS[config.structure], "norm": f"{norm}, {WORDS[config.norm_place]}{extra}",
            "positions": WORDS[config.positions] + rope,
            "attention": kind + ", unscaled" * (not config.scaled_attention),
            "feed-forward": WORDS[config.ffn], "block": WORDS[config.block], "biases": WORDS[config.bias],
            "unembedding": ("tied" if config.tied else "untied") + ", scaled" * config.scaled_logits}


def table() -> str:
    """A row per family. Where its sizes differ, both are said; parameters are counted on the meta device."""
    import torch

    import model
    rows = []
    for family, prefix in FAMILIES.items():
        names = [name for name in PRESETS if name.startswith(prefix)]
        with torch.device("meta"):
            counts = [model.parameter_count(model.build(preset(name))) for name in names]
        columns = [differences(preset(name)) for name in names]
        cells = {column: " / ".join(dict.fromkeys(row[column] for row in columns)) for column in columns[0]}
        ends = [f"{n / 1e9:.1f} B" if n > 1e9 else f"{n / 1e6:.0f} M" for n in (counts[0], counts[-1])]
        rows.append([family, *cells.values(), " – ".join(dict.fromkeys(ends))])
    head = ["", *cells, "parameters"]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    print(table())

"""Published tokenizers: byte-level BPE becomes a tiktoken.Encoding, everything else needs a package.

GPT-2's kind (vocab.json and merges.txt, or a tokenizer.json that says the same) is what tokenizer.py runs
itself. SentencePiece's kind (LLaMA, T5), and byte-level BPE behind other rules for words (Falcon), are run by
the package `tokenizers`, from tokenizer.json. An exported run gets a tokenizer.json as well.
"""
import contextlib
import itertools
import json
from pathlib import Path

from errors import UserError

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
# the characters that stand for the 256 bytes in vocab.json (Radford et al. 2019's encoder.py)
BYTES = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(OTHERS)}


# ---- what stands in for a tiktoken.Encoding ----------------------------------------------------------------

def spelt(tokens: list[int], names: dict[int, str], decode) -> str:
    """Text of the runs between special tokens, and these by name."""
    runs = ((name, list(run)) for name, run in itertools.groupby(tokens, names.get))
    return "".join(decode(run) if name is None else name * len(run) for name, run in runs)


class Renumbered:
    """A tiktoken.Encoding whose ids do not follow the order of its merges, as BART's."""

    def __init__(self, encoding, ids: list[int], specials: dict[str, int]):
        self.encoding, self.ids = encoding, ids
        self.ranks = {i: rank for rank, i in enumerate(ids)}
        self.names = {i: name for name, i in specials.items()}

    def encode_ordinary(self, text: str) -> list[int]:
        return [self.ids[rank] for rank in self.encoding.encode_ordinary(text)]

    def decode(self, tokens: list[int]) -> str:
        return spelt(tokens, self.names, lambda run: self.encoding.decode([self.ranks[i] for i in run]))


class Pieces:
    """A tokenizer.json run by the package `tokenizers`."""

    def __init__(self, content: dict, specials: dict[str, int]):
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"this tokenizer ({content['model']['type']}, with rules of its own) is run by a "
                            "package that is not installed: pip install tokenizers") from None
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(without_specials(content, specials)))
        except Exception as error:                                  # the package raises nothing more special
            raise UserError("the installed package tokenizers cannot read this tokenizer.json: "
                            f"{error}") from None
        self.names = {i: name for name, i in specials.items()}

    def encode_ordinary(self, text: str) -> list[int]:
        whole = text.encode(errors="replace").decode()         # the package refuses bytes that are no text
        return self.tokenizer.encode(whole, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        return spelt(tokens, self.names, lambda run: self.tokenizer.decode(run, skip_special_tokens=False))


def without_specials(content: dict, specials: dict[str, int]) -> dict:
    """The same rules, for which text that looks like a special token is ordinary text."""
    model = dict(content["model"])
    if model["type"] == "Unigram":             # it would find them in its vocabulary: there no text matches
        ids = set(specials.values()) - {model.get("unk_id")}
        model["vocab"] = [[f"\0{i}\0" if i in ids else piece, score]
                          for i, (piece, score) in enumerate(model["vocab"])]
    return {**content, "model": model, "added_tokens": [], "post_processor": None}


def text_of(piece: bytes, content: dict) -> bytes:
    """The bytes that a piece stands for: <0x0A> one, characters of BYTES one each, and ▁ is a space."""
    name = piece.decode()
    if name.startswith("<0x") and len(name) == 6:
        return bytes([int(name[3:5], 16)])
    if byte_level(content) and set(name) <= set(BYTES):
        return bytes(BYTES[character] for character in name)
    return name.replace("▁", " ").encode()


# ---- reading a published folder ----------------------------------------------------------------------------

@contextlib.contextmanager
def read_with_care(folder: Path):
    """Whatever odd files make the code in here stumble over becomes one sentence."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{folder}: the tokenizer's files are not as tokenizers have them "
                        f"({type(error).__name__}: {error})") from None


def published(folder: Path, c: dict, structure: str) -> tuple[dict[bytes, int], dict, str]:
    """The tokenizer beside a config.json `c`: ranks and settings, as Tokenizer takes them, and what was
    chosen where the two files say nothing. To be called in read_with_care.
    """
    content = read_content(folder)
    vocab = content["model"]["vocab"]
    vocab = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    specials = {added["content"]: added["id"] for added in content.get("added_tokens") or []}
    if odd := [i for i in specials.values() if type(i) is not int or i < 0]:
        raise ValueError(f"{odd[0]!r} is no id of a token")
    pattern = pattern_of(content)
    if pattern is not None:
        ranks, ids = ranks_of(folder, content)
        known = set(ids)
        specials |= {token: i for token, i in vocab.items() if i not in known}
        in_order = all(a < b for a, b in zip(ids, ids[1:]))
        ranks = dict(zip(ranks, ids)) if in_order else ranks
        how = {"pattern": pattern} if in_order else {"pattern": pattern, "ids": ids}
    else:
        ranks, how = {piece.encode(): i for piece, i in vocab.items()}, {"package": content}
    settings, chosen = roles(c, structure, specials)
    if structure == "encdec":
        settings["source_end"] = added_after(content, specials, settings["source_end"])
    sentinels = [specials[f"<extra_id_{i}>"] for i in range(100) if f"<extra_id_{i}>" in specials]
    settings |= {**how, "specials": specials, "sentinels": sentinels}
    return ranks, settings, f"{len(vocab.keys() | specials):,} tokens" + chosen


def read_content(folder: Path) -> dict:
    """tokenizer.json, or vocab.json and merges.txt in its form."""
    whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            return json.loads(whole.read_text(encoding="utf-8"))
        if vocab.is_file() and merges.is_file():
            lines = merges.read_text(encoding="utf-8").split("\n")
            lines = [line for line in lines if line and not line.startswith("#version")]
            return {"model": {"type": "BPE", "vocab": json.loads(vocab.read_text(encoding="utf-8")),
                              "merges": lines}, "pre_tokenizer": {"type": "ByteLevel"}}
    except ValueError as error:
        raise UserError(f"{folder}: the tokenizer cannot be read: {error}") from None
    raise UserError(f"{folder} holds neither tokenizer.json nor vocab.json with merges.txt. Of a "
                    "tokenizer.model or spiece.model (not of ChatGLM's or Baichuan's, which are code of "
                    "their own) the first is made once, after pip install transformers sentencepiece "
                    f"protobuf: AutoTokenizer.from_pretrained({str(folder)!r})"
                    f".save_pretrained({str(folder)!r})")


def added_after(content: dict, specials: dict[str, int], default: list[int]) -> list[int]:
    """The special tokens that tokenizer.json puts after a text; default, where it does not say."""
    after = content.get("post_processor") or {}
    if after.get("type") != "TemplateProcessing":
        return default
    kinds = [next(iter(step)) for step in after["single"]]
    return [specials[step["SpecialToken"]["id"]] for step in after["single"][kinds.index("Sequence") + 1:]]


def byte_level(content: dict) -> bool:
    """Whether pieces are spelt in BYTES."""
    before = content.get("pre_tokenizer") or {}
    return "ByteLevel" in [step.get("type") for step in [before, *before.get("pretokenizers", [])]]


def pattern_of(content: dict) -> str | None:
    """The words of a byte-level BPE: a pattern, or "" for GPT-2's own. None: tiktoken cannot express it."""
    before, model = content.get("pre_tokenizer") or {}, content["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or content.get("normalizer"):
        return None
    steps = before.get("pretokenizers", [before])
    if any(step.get("add_prefix_space") for step in steps):
        return None
    match [step.get("type") for step in steps]:
        case ["ByteLevel"] if steps[0].get("use_regex", True):
            return ""
        case ["Split", "ByteLevel"] if not steps[1].get("use_regex", True):
            split = steps[0]
            isolated = split["behavior"] == "Isolated" and not split.get("invert")
            return split["pattern"].get("Regex") if isolated else None
    return None


def ranks_of(folder: Path, content: dict) -> tuple[dict[bytes, int], list[int]]:
    """Bytes first, then merges in their order -> rank; and the published id of each rank."""
    vocab = content["model"]["vocab"]
    missing = [byte for character, byte in BYTES.items() if character not in vocab]
    if missing:
        raise UserError(f"{folder}: the tokenizer has no token for {len(missing)} of the 256 bytes")
    tokens = dict.fromkeys(sorted(BYTES, key=vocab.get))
    for merge in content["model"]["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        tokens[first + second] = None
    lost = [token for token in tokens if token not in vocab]
    if lost:
        raise UserError(f"{folder}: the tokenizer merges to {lost[0]!r}, which is not in its vocabulary")
    ranks = {bytes(BYTES[character] for character in token): rank for rank, token in enumerate(tokens)}
    return ranks, [vocab[token] for token in tokens]


def roles(c: dict, structure: str, specials: dict[str, int]) -> tuple[dict, str]:
    """Which special tokens pad, begin and end; and what had to be chosen."""
    names, chosen = {i: name for name, i in specials.items()}, ""
    end = c.get("eos_token_id")
    end = (end or [None])[0] if isinstance(end, list) else end
    if end not in names:
        raise UserError(f"config.json's eos_token_id is {end}, which is no special token of the tokenizer")
    bos, pad = c.get("bos_token_id"), c.get("pad_token_id")
    if pad not in names:
        pad, chosen = end, f"; no padding token, {names[end]} fills rows (masked by place, not by id)"
    if structure == "encdec":                  # T5 reads source </s>, BART <s> source </s>
        start = c.get("decoder_start_token_id")
        start = pad if start is None else start
        if start not in names:
            raise UserError(f"config.json's decoder_start_token_id is {start}, which is no special token of "
                            "the tokenizer")
        begin = [bos] if bos in names else []
        target = [start] + [token for token in begin if token != start]
        return {"pad": pad, "end": end, "begin": begin, "source_end": [end], "target_begin": target}, chosen
    begin, source_end, target = [bos], [], []
    if "gmask_token_id" in c:                  # ChatGLM-6B: source [gMASK] <sop> target, a blank at the end
        gmask = c["gmask_token_id"]
        if gmask not in names or bos not in names:
            raise UserError(f"config.json's gmask_token_id {gmask} and bos_token_id {bos} must be special "
                            "tokens of the tokenizer")
        begin, source_end, target = [], [gmask], [bos]
    elif "[gMASK]" in specials:                # ChatGLM2: [gMASK] sop source target
        begin = [specials["[gMASK]"], specials["sop"]]
    elif bos not in names:
        begin, chosen = [end], chosen + f"; no beginning token, texts begin with {names[end]}"
    settings = {"pad": pad, "end": end, "begin": begin, "source_end": source_end, "target_begin": target}
    return settings, chosen


# ---- writing one -------------------------------------------------------------------------------------------

def content_of(tokenizer, ids: list[int], merges: list[tuple[bytes, bytes]], pattern: str) -> dict:
    """A tokenizer.json that encodes as `tokenizer` (a Tokenizer) does, and puts around a text what stands
    around a source. ids and merges: of its ranks; pattern: of its words. (The libraries that read it take
    text that looks like a special token for one.)
    """
    spelling = {byte: character for character, byte in BYTES.items()}

    def spell(token: bytes) -> str:
        return "".join(spelling[byte] for byte in token)
    names = {i: name for name, i in tokenizer.specials.items()}
    added = [*tokenizer.begin, *tokenizer.source_end]
    around = [{"SpecialToken": {"id": names[i], "type_id": 0}} for i in added]
    around.insert(len(tokenizer.begin), {"Sequence": {"id": "A", "type_id": 0}})
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bytes_as_characters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                           "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [{"id": i, "content": name, **plain} for i, name in sorted(names.items())],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_as_characters]},
        "post_processor": {"type": "TemplateProcessing", "single": around,
                           "pair": [*around, {"Sequence": {"id": "B", "type_id": 0}}],
                           "special_tokens": {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]}
                                              for i in added}},
        "decoder": bytes_as_characters,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False,
                  "vocab": {spell(token): i for token, i in zip(tokenizer.ranks, ids)},
                  "merges": [[spell(first), spell(second)] for first, second in merges]}}

"""Published checkpoints: their files, their names for what model.py calls otherwise, and the way back.

    python weights.py import FOLDER runs/llama2              a run folder, for generate.py and later stages,
                                                             of config.json, *.safetensors and a tokenizer
    python weights.py export runs/x FOLDER --layout llama    (or gpt2, t5) config.json, *.safetensors and
                                                             tokenizer.json

The names are in layouts.py. Reading is strict: every published tensor is used once, or is named among those
that may be left out. Weights keep their number format; loaded from the run folder, a model computes in fp32.
"""
import argparse
import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Mapping, NamedTuple

import numpy as np
import torch
from torch import Tensor

import checkpoint
import command_line
import common
import published_tokenizers
from errors import UserError, read_json
from layouts import LAYOUTS, Layout, read_config
from model import LanguageModel, ModelConfig, build, parameter_count
from tokenizer import Tokenizer

# ---- safetensors: 8 bytes of length, that much JSON, and the tensors' bytes --------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
LONGEST_HEADER = 100_000_000


class Entry(NamedTuple):
    """Where a tensor lies in its file."""
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Tensors(Mapping):
    """name -> tensor, mapped from its file anew at every access: only what is held takes memory."""

    def __init__(self, entries: dict[str, Entry]):
        self.entries = entries

    def __getitem__(self, name: str) -> Tensor:
        path, dtype, shape, start, end = self.entries[name]
        if start == end:
            return torch.empty(shape, dtype=dtype)
        # subtle: copy-on-write, so that the file stays as it is, and a storage of its own, since torch.save
        # writes whole storages
        raw = torch.from_numpy(np.memmap(path, np.uint8, "c", start, (end - start,)))
        aligned = raw if start % dtype.itemsize == 0 else raw.clone()
        return aligned.view(dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of one file, and its metadata. Nothing but the header is read, and all of it is checked."""
    path = Path(path)

    def once(pairs: list) -> dict:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
        return dict(pairs)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise UserError(f"{path} is no safetensors file, or cut short: it has {size:,} bytes, its header "
                            f"alone should have {length:,}")
        try:
            header = json.loads(file.read(length), object_pairs_hook=once)
            metadata = header.pop("__metadata__", {})
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: the header is no JSON object of tensors ({error})") from None
    entries = {name: entry(path, name, what, 8 + length) for name, what in header.items()}
    end = 8 + length
    for name, one in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if one.start != end:
            kind = "overlaps the tensor before it" if one.start < end else "leaves a hole before it"
            raise UserError(f"{path}: tensor {name} {kind}: it begins at byte {one.start:,}, not {end:,}")
        end = one.end
    if end != size:
        raise UserError(f"{path} has {size:,} bytes, and its tensors end at {end:,}: it is cut short or has "
                        "something added; fetch it again")
    return Tensors(entries), metadata


def entry(path: Path, name: str, what: dict, data: int) -> Entry:
    """One tensor's line of the header, checked on its own. data: where the tensors' bytes begin."""
    try:
        dtype, shape, (start, end) = what["dtype"], tuple(what["shape"]), what["data_offsets"]
        whole = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"{path}: tensor {name} is described by {what}; wanted are dtype, shape and "
                        "data_offsets, in whole numbers")
    if dtype not in DTYPES:
        raise UserError(f"{path}: tensor {name} has dtype {dtype}; known are {', '.join(DTYPES)}")
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != wanted:
        raise UserError(f"{path}: tensor {name}, {dtype} {shape}, takes {wanted:,} bytes; its data_offsets "
                        f"{start:,} to {end:,} hold {end - start:,}")
    return Entry(path, DTYPES[dtype], shape, data + start, data + end)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """The same way back. The file appears under its name only when it is complete and on the disk."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    # widest numbers first: then every tensor lies at a multiple of its numbers' width
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, end = {"__metadata__": metadata}, 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": names[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with common.replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def write_folder(folder: Path, tensors: Mapping[str, Tensor], shard: int = 5 * 10**9) -> None:
    """model.safetensors, or files of up to `shard` bytes (a larger tensor has its own) and their index. What
    another division has left in the folder is removed last.
    """
    shards: list[dict[str, Tensor]] = [{}]
    for name, x in tensors.items():
        if shards[-1] and sum(y.nbytes for y in shards[-1].values()) + x.nbytes > shard:
            shards.append({})
        shards[-1][name] = x
    n, files = len(shards), ["model.safetensors"]
    if n > 1:
        files = [f"model-{k:05}-of-{n:05}.safetensors" for k in range(1, n + 1)]
    for file, part in zip(files, shards):
        write_safetensors(folder / file, part, {"format": "pt"})
    if n > 1:
        index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
                 "weight_map": {name: file for file, part in zip(files, shards) for name in part}}
        files.append("model.safetensors.index.json")
        common.write_atomically(folder / files[-1], json.dumps(index, indent=1).encode())
    for old in (*folder.glob("model.safetensors*"), *folder.glob("model-*-of-*.safetensors")):
        if old.name not in files:
            old.unlink()


def read_folder(folder: Path) -> Tensors:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_safetensors(single)[0]
    if not index.is_file():
        raise UserError(f"{folder} holds neither {single.name} nor {index.name}; other formats are not read")
    where = read_json(index).get("weight_map")
    files = where.values() if isinstance(where, dict) else [None]
    if not all(isinstance(file, str) and file == Path(file).name for file in files):
        raise UserError(f"{index} has no weight_map from tensors to files of this folder")
    entries: dict[str, Entry] = {}
    for file in sorted(set(where.values())):
        if not (folder / file).is_file():
            raise UserError(f"{index} names {file}, which is not there: fetch it")
        here, listed = read_safetensors(folder / file)[0].entries, {n for n in where if where[n] == file}
        if set(here) != listed:
            odd = sorted(set(here) ^ listed)
            raise UserError(f"{index} and {file} disagree about {len(odd)} tensors: {', '.join(odd[:3])}")
        entries |= here
    return Tensors(entries)


# ---- published tensors -> ours, and back ------------------------------------------------------------------

class Part(NamedTuple):
    """A published tensor that is all of one of ours, or some of its rows."""
    name: str
    rows: slice
    shape: torch.Size


def plan(layout: Layout, config: ModelConfig) -> dict[str, list[Part]]:
    """{our tensor: the published ones that are its rows, from top to bottom}"""
    with torch.device("meta"):
        ours = build(config).state_dict()
    names, parts = layout.names(config), {}
    H, G, K = config.heads, config.kv_heads, config.head_width
    for key, x in ours.items():
        module, _, kind = key.rpartition(".")
        layer = re.search(r"\d+", module)
        theirs = names[re.sub(r"\d+", "*", module)].replace("*", layer[0] if layer else "") + "." + kind
        head, _, choices, tail = re.fullmatch(r"([^{]*)({([^}]*)})?(.*)", theirs).groups()
        theirs = [head + choice + tail for choice in (choices or "").split(",")]
        heights = {1: [len(x)], 2: [len(x) // 2] * 2, 3: [H * K, G * K, G * K]}[len(theirs)]
        ends = np.cumsum(heights).tolist()
        parts[key] = [Part(name, slice(end - n, end), layout.turn(name, x[end - n:end], config).shape)
                      for name, n, end in zip(theirs, heights, ends)]
    return parts


def to_ours(published: Mapping[str, Tensor], layout: Layout, config: ModelConfig,
            folder="") -> dict[str, Tensor]:
    """Our state dict. What is one tensor here and there stays mapped from its file; the rest is joined."""
    found = {name.removeprefix(layout.prefix): name for name in published}
    if len(found) < len(published):
        twice = next(name for name in published if layout.prefix + name in published)
        raise UserError(f"{folder}: it holds both {twice} and {layout.prefix}{twice}; one of them must go")
    parts = plan(layout, config)
    wanted = {part.name: tuple(part.shape) for of in parts.values() for part in of}
    left_out = {name: same for name in found for pattern, same in layout.left_out.items()
                if re.fullmatch(pattern, name) and name not in wanted}
    for key, (first, *_) in parts.items():               # of several copies a file may hold any
        copies = [name for name, same in left_out.items() if same == key]
        if first.name not in found and copies:
            found[first.name] = found[copies[0]]
    check(published, found, wanted, left_out, folder)
    state = {}
    for key, of in parts.items():
        pieces = [layout.turn(part.name, published[found[part.name]], config) for part in of]
        state[key] = torch.cat(pieces) if len(pieces) > 1 else pieces[0].contiguous()
    for name, same in left_out.items():
        expected = torch.zeros_like(published[found[name]]) if same == "zeros" else state.get(same)
        if expected is not None and not torch.equal(published[found[name]], expected):
            raise UserError(f"{folder}: {found[name]} is not {same}, which is all that is built here")
    return state


def check(published, found: dict[str, str], wanted: dict[str, tuple], left_out: dict, folder) -> None:
    """Every tensor that is wanted is there, in its shape and in floating point, and no other."""
    wrong = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in found]
    for name, original in found.items():
        if name in wanted:
            x = published[original]
            if tuple(x.shape) != wanted[name]:
                wrong.append(f"{original} is {tuple(x.shape)}, not {wanted[name]}")
            elif not x.is_floating_point() or x.element_size() < 2:
                wrong.append(f"{original} has dtype {str(x.dtype)[6:]}, not one of weights")
        elif name not in left_out:
            wrong.append(f"unexpected {original} {tuple(published[original].shape)}")
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} tensors are not what config.json says: "
                        + "; ".join(wrong[:5]) + "; ..." * (len(wrong) > 5))


def to_published(state: Mapping[str, Tensor], layout: Layout, config: ModelConfig) -> dict[str, Tensor]:
    """The published tensors. Layouts that are written turn nothing, or transpose, which undoes itself."""
    return {part.name: layout.turn(part.name, state[key][part.rows], config).contiguous()
            for key, of in plan(layout, config).items() for part in of}


# ---- import and export -------------------------------------------------------------------------------------

@dataclass
class Config:
    command: str                        # import, export
    source: str                         # import: a published checkpoint's folder; export: a run folder
    out: str                            # import: the run folder to make; export: the folder to write
    layout: str = "llama"               # export as llama, gpt2, t5
    overwrite: bool = False             # replace what `out` holds
    keep: int = 1                       # checkpoints kept


def import_folder(config: Config) -> LanguageModel:
    """A run folder from a published checkpoint. Everything is checked before anything is written."""
    folder, run = Path(config.source), common.Run(Path(config.out), torch.device("cpu"), torch.float32)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; wanted is one with config.json and *.safetensors")
    if checkpoint.steps_of(run.folder) and not config.overwrite:
        raise UserError(f"{run.folder} holds a run already; choose another folder, or --overwrite it")
    c = read_json(folder / "config.json")
    layout, model_config = read_config(c)
    with published_tokenizers.read_with_care(folder):
        ranks, settings, told = published_tokenizers.published(folder, c, model_config.structure)
        tokenizer = Tokenizer(ranks, settings)
    if tokenizer.vocab > model_config.vocab:
        raise UserError(f"{folder}: the tokenizer has ids up to {tokenizer.vocab - 1}, the network has "
                        f"{model_config.vocab} tokens")
    with torch.device("meta"):
        model = build(model_config)
    model.load_state_dict(to_ours(read_folder(folder), layout, model_config, folder), assign=True)
    checkpoint.open_run(run, config, tokenizer, set())
    checkpoint.save(run, 0, config, model_config, model=model)
    print(f"{run.folder}: {parameter_count(model):,} parameters, {told}\n"
          f"next: {common.first_question(config.out, config.source)}")
    return model


def export_folder(config: Config) -> None:
    """A run's newest model in a published layout. What the layout cannot say is refused."""
    run, out = Path(config.source), Path(config.out)
    known = [name for name, layout in LAYOUTS.items() if layout.write_config]
    if config.layout not in known:
        raise UserError(f"layout is {config.layout!r}; it must be one of {', '.join(known)}")
    if any(out.glob("model.safetensors*")) and not config.overwrite:
        raise UserError(f"{out} holds a model already; choose another folder, or --overwrite it")
    tokenizer = checkpoint.load_tokenizer(run, "pretrain")
    state, layout = checkpoint.latest(run), LAYOUTS[config.layout]
    if state is None:
        raise UserError(f"{run} holds no checkpoint that can be read")
    if "head.weight" in state["model"]:
        raise UserError(f"{run} holds no language model; a reward model has no published layout")
    model_config = ModelConfig(**state["model_config"])
    c = layout.write_config(model_config)
    try:
        back = dataclasses.replace(layout.read_config(c), init=model_config.init,
                                   embedding_gradient=model_config.embedding_gradient)
    except UserError as error:
        raise UserError(f"{run} is no {config.layout}: {error}") from None
    lost = [f"{name} {value!r}" for name, value in vars(model_config).items() if getattr(back, name) != value]
    if lost:
        raise UserError(f"{run} is no {config.layout}: that layout has no place for {', '.join(lost)}")
    bos = tokenizer.begin[0] if tokenizer.begin else None                                   # T5 has none
    c |= {"bos_token_id": bos, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad}
    if model_config.structure == "encdec":
        c["decoder_start_token_id"] = tokenizer.frame("encdec")[2][0]
    out.mkdir(parents=True, exist_ok=True)
    write_folder(out, to_published(state["model"], layout, model_config))
    names = {i: name for name, i in tokenizer.specials.items()}
    roles = {role: names.get(c[f"{role}_id"]) for role in ("bos_token", "eos_token", "pad_token")}
    for file, content in (("config.json", c), ("tokenizer.json", tokenizer.published()),
                          ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **roles})):
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        common.write_atomically(out / file, text.encode())
    print(f"{out}: the model of {run}, step {state['step']}, as {config.layout}, and its tokenizer")


def parse(config_class, argv: list[str], description: str) -> Config:
    plain = argparse.RawDescriptionHelpFormatter
    parser = command_line.Parser(description=description, formatter_class=plain)
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export")
    for command, source, out in (("import", "a published checkpoint's folder", "the run folder to make"),
                                 ("export", "a run folder", "the folder to write")):
        flags = commands.add_parser(command)
        flags.add_argument("source", help=source)
        flags.add_argument("out", help=out)
        flags.add_argument("--overwrite", action="store_true", help="replace what the second folder holds")
    commands.choices["export"].add_argument("--layout", required=True, help="llama, gpt2, t5")
    return config_class(**vars(parser.parse_args(argv)))


def main(config: Config) -> None:
    if Path(config.source).resolve() == Path(config.out).resolve():
        raise UserError(f"{config.out} is both what is read and what is written; choose another folder")
    import_folder(config) if config.command == "import" else export_folder(config)


if __name__ == "__main__":
    command_line.run(main, Config, __doc__, parse)

"""From text to batches: the tokenizer, the default corpus, file formats, and the layout of pairs in rows.

    text --encode--> tokens --objective--> (source, target) --lay_out--> Batch --masks.of_batch--> model

The default corpus needs no download: it is the documentation strings of the Python installation at hand, read
with `ast`, nothing imported. Own data (`--data`) is a .txt, a .jsonl, or a .py file or folder, recognised by
its keys.
"""
import ast
import base64
import functools
import hashlib
import heapq
import importlib.util
import json
import os
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import regex                      # comes with tiktoken
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

import objectives
from common import UserError

CACHE = Path("runs/cache")

# ---- the tokenizer: byte-level BPE, trained here, run by tiktoken ------------------------------------------

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIALS = ("<pad>", "<bos>", "<end>", *(f"<extra_{i}>" for i in range(100)))    # the extras: T5's sentinels


def train_bpe(texts: list[str], vocab: int) -> dict[bytes, int]:
    """Byte-pair encoding (Sennrich et al. 2016, algorithm 1): merge the most frequent pair, again and again.

    Returns token bytes -> rank: the 256 bytes, then one merge after another, until ranks and special tokens
    together are `vocab`. Ties go to the pair that comes first in byte order, so that the result depends on
    the counts alone. Pair counts are kept up to date instead of counted anew: a merge touches only the words
    that hold the pair.
    """
    n_merges = vocab - 256 - len(SPECIALS)
    if n_merges < 0:
        raise UserError(f"vocab {vocab} is too small: 256 bytes and {len(SPECIALS)} special tokens are in it")
    words = Counter()
    for text in texts:
        words.update(regex.findall(PATTERN, text))
    words = [([bytes([b]) for b in word.encode()], count) for word, count in words.items()]
    counts, holders = Counter(), defaultdict(set)
    for i, (word, count) in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += count
            holders[pair].add(i)
    ranks = {bytes([b]): b for b in range(256)}
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    progress = tqdm(total=n_merges, desc="tokenizer: merges", leave=False, disable=None)
    while heap and len(ranks) < 256 + n_merges:
        count, pair = heapq.heappop(heap)
        if counts[pair] != -count:                  # a stale entry: its count has changed since
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        ranks.setdefault(pair[0] + pair[1], len(ranks))
        changed = _merge_pair(words, counts, holders, pair)
        for other in changed:
            if counts[other] > 0:
                heapq.heappush(heap, (-counts[other], other))
        progress.update()
    progress.close()
    return ranks


def _merge_pair(words: list, counts: Counter, holders: dict, pair: tuple) -> set:
    """Merge `pair` in every word that holds it; returns the pairs whose count grew."""
    grown = set()
    for i in holders.pop(pair):
        word, count = words[i]
        for old in zip(word, word[1:]):
            counts[old] -= count
        merged, j = [], 0
        while j < len(word):
            step = 2 if j + 1 < len(word) and (word[j], word[j + 1]) == pair else 1
            merged.append(b"".join(word[j:j + step]))
            j += step
        words[i] = (merged, count)
        for new in zip(merged, merged[1:]):
            counts[new] += count
            holders[new].add(i)
            grown.add(new)
    counts.pop(pair, None)
    return grown


def encode_by_hand(text: str, ranks: dict[bytes, int]) -> list[int]:
    """What tiktoken computes: in each word, merge the adjacent pair of lowest rank until none is left."""
    tokens = []
    for word in regex.findall(PATTERN, text):
        parts = [bytes([b]) for b in word.encode()]
        while len(parts) > 1:
            rank, j = min((ranks.get(a + b, len(ranks)), j) for j, (a, b) in enumerate(zip(parts, parts[1:])))
            if rank == len(ranks):
                break
            parts[j:j + 2] = [parts[j] + parts[j + 1]]
        tokens += [ranks[part] for part in parts]
    return tokens


class Tokenizer:
    """A tiktoken.Encoding and the ids of the special tokens. Text that looks like a special token is ordinary
    text.
    """

    def __init__(self, ranks: dict[bytes, int]):
        self.ranks = ranks
        specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
        self.encoding = tiktoken.Encoding("ours", pat_str=PATTERN, mergeable_ranks=ranks,
                                          special_tokens=specials)
        self.vocab = len(ranks) + len(SPECIALS)
        self.pad, self.bos, self.end = (specials[name] for name in SPECIALS[:3])
        self.sentinels = [specials[name] for name in SPECIALS[3:]]

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def decode(self, tokens: list[int]) -> str:
        """The text of an answer: without the end token and what may follow it."""
        tokens = list(tokens)
        return self.encoding.decode(tokens[:tokens.index(self.end)] if self.end in tokens else tokens)

    def bytes_per_token(self) -> Tensor:
        """(V,) how many bytes of text each token stands for; a special token stands for none."""
        sizes = torch.zeros(self.vocab, dtype=torch.long)
        for token, rank in self.ranks.items():
            sizes[rank] = len(token)
        return sizes

    def save(self, path: Path) -> None:
        lines = (base64.b64encode(token) + b" %d" % rank for token, rank in self.ranks.items())
        write_atomically(path, b"\n".join(lines) + b"\n")

    @staticmethod
    def load(path: Path) -> "Tokenizer":
        lines = (line.split() for line in Path(path).read_bytes().splitlines())
        return Tokenizer({base64.b64decode(token): int(rank) for token, rank in lines})


def write_atomically(path: Path, content: bytes) -> None:
    """An interrupted program leaves the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


# ---- the default corpus: docstrings of the installation at hand --------------------------------------------

PACKAGES = ("torch", "numpy", "tiktoken", "tqdm", "matplotlib", "pytest", "sympy", "networkx", "mpmath",
            "fontTools", "PIL", "_pytest", "pygments", "fsspec", "mpl_toolkits", "pyparsing", "jinja2",
            "packaging", "urllib3", "filelock", "dateutil", "requests", "typing_extensions", "contourpy",
            "cycler", "kiwisolver", "idna", "pluggy")
TINY_MODULES = ("argparse", "collections", "email", "json", "logging", "random", "statistics", "urllib")
SKIPPED = {"__pycache__", "site-packages", "test", "tests", "testing", "idlelib", "lib2to3", "_vendor"}


@dataclass
class Record:
    """One piece of data. `name` decides the split; a field that the data does not have is None."""
    name: str
    text: str | None = None             # what pretraining reads
    prompt: str | None = None
    response: str | None = None         # a human answer
    chosen: str | None = None
    rejected: str | None = None


def identifier_words(identifier: str) -> list[str]:
    """get_HTTPHeader2 -> get, http, header, 2"""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", identifier)]


def function_prompt(signature: str) -> str:
    """The prompt for a function: its signature and a line of its identifier's words.

    >>> function_prompt("def area(width, height):")
    'def area(width, height):\\n# area\\n'
    """
    name = function_name(signature)
    return f"{signature.strip()}\n# {' '.join(identifier_words(name))}\n"


def function_name(prompt: str) -> str:
    """The identifier that a prompt of ours is about; empty when it is no function signature."""
    match = re.match(r"\s*(?:async )?(?:def|class)\s+(?:\w+\.)*(\w+)", prompt)
    return match.group(1) if match else ""


def summary_line(docstring: str) -> str | None:
    """The first sentence of a docstring in plain text, or None where there is none worth learning."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    paragraph = re.sub(r":[\w:+-]+:`~?([^`<]+?)(?: <[^>]*>)?`", r"`\1`", paragraph).replace("``", "`")
    sentence = re.match(r".*?[.!?](?=\s+[A-Z`]|$)", paragraph)
    line = sentence.group(0) if sentence else paragraph
    is_prose = line.isascii() and line[:1].isalpha() and ">>>" not in line and "::" not in line
    return line if is_prose and 3 <= len(line.split()) <= 20 else None


def scan_file(path_and_module: tuple[str, str]) -> list[dict]:
    """Every docstring of one source file, after the signature it belongs to. A file that does not parse has
    none.
    """
    path, module = path_and_module
    found = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return found

    def visit(node, owner: str):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                bases = ", ".join(ast.unparse(base) for base in child.bases)
                add(child, child.name, f"class {child.name}({bases}):")
                visit(child, f"{child.name}.")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                add(child, child.name, f"def {owner}{child.name}({argument_names(child.args)}):")
                visit(child, owner)
            else:
                visit(child, owner)

    def add(node, name: str, signature: str):
        docstring = ast.get_docstring(node)
        if not docstring or len(signature) > 200:
            return
        prompt = function_prompt(signature) if not isinstance(node, ast.Module) else f"{signature}\n"
        is_function = signature.startswith("def") and not (name.startswith("__") and name.endswith("__"))
        summary = summary_line(docstring) if is_function and identifier_words(name) else None
        found.append({"name": name, "text": prompt + docstring,
                      "prompt": prompt if summary else None, "response": summary})

    add(tree, module.split(".")[-1], f"module {module}")
    visit(tree, "")
    return found


def argument_names(args: ast.arguments) -> str:
    """a, b, *rest, key, **options: names alone, without annotations and defaults."""
    names = [arg.arg for arg in args.posonlyargs + args.args]
    names += [f"*{args.vararg.arg}"] if args.vararg else ["*"] if args.kwonlyargs else []
    names += [arg.arg for arg in args.kwonlyargs]
    return ", ".join(names + ([f"**{args.kwarg.arg}"] if args.kwarg else []))


def python_files(place: Path, module: str) -> list[tuple[str, str]]:
    """(path, dotted module) of the sources of a package or module, in a fixed order."""
    if place.is_file():
        return [(str(place), module)]
    files = []
    for folder, inner, names in os.walk(place):
        inner[:] = sorted(name for name in inner if name not in SKIPPED)
        dotted = ".".join([module, *Path(folder).relative_to(place).parts]).strip(".")
        files += [(os.path.join(folder, name), f"{dotted}.{name[:-3]}".replace(".__init__", "").strip("."))
                  for name in sorted(names) if name.endswith(".py") and not name.startswith("test_")]
    return files


def corpus_files(tiny: bool) -> list[tuple[str, str]]:
    """The sources of the default corpus that this installation has."""
    standard = Path(sysconfig.get_paths()["stdlib"])
    if tiny:
        places = [(standard / name, name) for name in TINY_MODULES]
        return [file for place, name in places
                for file in python_files(place if place.is_dir() else place.with_suffix(".py"), name)]
    files = python_files(standard, "")
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)        # finds, does not import
        if spec and spec.submodule_search_locations:
            files += python_files(Path(list(spec.submodule_search_locations)[0]), name)
        elif spec and spec.origin:
            files += python_files(Path(spec.origin), name)
    return files


def scan(files: list[tuple[str, str]]) -> list[Record]:
    """All docstrings of these files, read in parallel, cached by the files' names and sizes.

    The same text counts once, and of several functions with the same summary only the first keeps it as a
    pair.
    """
    size_of = {path: os.path.getsize(path) for path, _ in files}
    inventory = json.dumps([[module, size_of[path]] for path, module in files])
    key = hashlib.sha256(inventory.encode() + Path(__file__).read_bytes())
    cached = CACHE / f"docstrings-{key.hexdigest()[:16]}.jsonl"
    if cached.exists():
        return [Record(**json.loads(line)) for line in cached.read_text(encoding="utf-8").splitlines()]
    with ProcessPoolExecutor(os.cpu_count() if len(files) > 500 else 1) as pool:
        results = pool.map(scan_file, files, chunksize=16)
        results = tqdm(results, total=len(files), desc="reading docstrings", leave=False, disable=None)
        found = [row for rows in results for row in rows]
    texts, summaries, records = set(), set(), []
    for row in found:
        if row["text"] in texts:
            continue
        texts.add(row["text"])
        if row["response"] and row["response"].lower() in summaries:
            row["prompt"] = row["response"] = None
        summaries.add((row["response"] or "").lower())
        records.append(row)
    write_atomically(cached, "".join(json.dumps(row) + "\n" for row in records).encode())
    return [Record(**row) for row in records]


# ---- own data, recognised by its keys ----------------------------------------------------------------------

ACCEPTED = {("text",): {"text": "text"},
            ("prompt", "chosen", "rejected"): {name: name for name in ("prompt", "chosen", "rejected")},
            ("prompt", "response"): {"prompt": "prompt", "response": "response"},
            ("prompt", "completion"): {"prompt": "prompt", "completion": "response"},
            ("prompt",): {"prompt": "prompt"}}


def load_records(path: str, tiny: bool = False) -> list[Record]:
    """The records of a file or folder; of the default corpus where no path is given. Faults name file and
    line.
    """
    if not path:
        return scan(corpus_files(tiny))
    place = Path(path)
    if not place.exists():
        raise UserError(f"--data {path}: there is no such file")
    if place.is_dir() or place.suffix == ".py":
        records = scan(python_files(place, place.stem))
    else:
        try:
            content = place.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--data {path}: byte {error.start} is not UTF-8; convert the file") from None
        records = read_jsonl(path, content) if place.suffix == ".jsonl" else read_text(path, content)
    if not records:
        raise UserError(f"--data {path}: it is empty")
    return records


def read_text(path: str, content: str) -> list[Record]:
    """A plain text as documents: cut at blank lines into parts of a few thousand characters."""
    parts, size = [[]], 0
    for paragraph in re.split(r"\n\s*\n", content):
        if size + len(paragraph) > 4000 and parts[-1]:
            parts, size = parts + [[]], 0
        parts[-1].append(paragraph)
        size += len(paragraph)
    texts = ["\n\n".join(part) for part in parts]
    return [Record(f"{path}:{i}", text=text) for i, text in enumerate(texts) if text.strip()]


def read_jsonl(path: str, content: str) -> list[Record]:
    records = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from None
        names = next((names for names in ACCEPTED if isinstance(row, dict) and set(names) <= set(row)), None)
        if names is None:
            accepted = "; ".join(" + ".join(names) for names in ACCEPTED)
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{path}:{number}: found {found or 'no keys'}; accepted are the keys {accepted}")
        for name in names:
            if not isinstance(row[name], str) or not row[name].strip():
                raise UserError(f"{path}:{number}: {name!r} must be a text that is not empty")
        fields = {ours: row[theirs] for theirs, ours in ACCEPTED[names].items()}
        name = function_name(fields.get("prompt", "")) or fields.get("prompt") or fields["text"]
        records.append(Record(name, **fields))
    return records


def is_held_out(name: str) -> bool:
    """One name in twenty belongs to the evaluation set, in every stage and on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 20 == 0


def split(records: list[Record], kept: set[str] = frozenset()) -> tuple[list[Record], list[Record]]:
    """(training, held out): no name occurs in both. kept: the held-out names that an earlier stage wrote
    down.

    Where the rule leaves nothing on one side (a handful of records), the last tenth is held out.
    """
    held = [record for record in records if record.name in kept or is_held_out(record.name)]
    train = [record for record in records if not (record.name in kept or is_held_out(record.name))]
    if (not held or not train) and len(records) > 1:
        n = max(1, len(records) // 10)
        return records[:-n], records[-n:]
    return train, held


def objective_of(name: str, tokenizer: "Tokenizer"):
    """The function (tokens of a text, generator) -> (source, target) of that name in objectives.py."""
    known = {"next_token": objectives.next_token, "prefix_lm": objectives.prefix_lm,
             "span_corruption": functools.partial(objectives.span_corruption, sentinels=tokenizer.sentinels)}
    if name not in known:
        raise UserError(f"objective is {name!r}; it must be one of {', '.join(known)}")
    return known[name]


def names_of(records: list[Record]) -> set[str]:
    return {record.name for record in records}


# ---- layout: examples -> Batch -----------------------------------------------------------------------------

Example = tuple[list[int], list[list[int]]]       # a source and its targets: one, or the answers to a prompt


@dataclass
class Batch:
    """Named tensors of packed rows: what the model reads, and where the loss counts. All (B, T), source* (B,
    S).

    A decoder's row is <bos> source target; an encoder-decoder has <bos> source in `source` and <bos> target
    here. The whole target is in the row, its last token too (there the reward is read), although nothing
    follows it.
    """
    tokens: Tensor
    targets: Tensor              # the token after each token: what its logits predict
    loss_mask: Tensor            # True where that is a target token
    positions: Tensor            # restart at every document; every target begins where the source ended
    document: Tensor             # index of the example in the batch, -1: padding
    part: Tensor                 # 0: source, k: k-th target
    last: Tensor                 # True at the last token of each target
    source: Tensor | None = None
    source_positions: Tensor | None = None
    source_document: Tensor | None = None
    one_per_row: bool = False    # every row holds one source with one target

    def to(self, device) -> "Batch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x
                        for name, x in moved.items()})

    def padding(self) -> tuple[int, int]:
        """(padding tokens, all tokens) of the rows that the model computes."""
        rows = [x for x in (self.document, self.source_document) if x is not None]
        return sum(int((x < 0).sum()) for x in rows), sum(x.numel() for x in rows)


def loss_weights(batch: Batch, structure: str, source_weight: float) -> Tensor:
    """(B, T) 1 where a target token is predicted; source_weight where a source token is, which only the
    causal decoder can be asked to do: the others see the whole source at once.
    """
    weights = batch.loss_mask.float()
    if source_weight and structure == "causal":
        next_document, next_part = (torch.roll(x, -1, dims=1) for x in (batch.document, batch.part))
        in_source = (batch.document >= 0) & (next_document == batch.document) & (next_part == 0)
        in_source[:, -1] = False
        weights = weights + source_weight * in_source
    return weights


def balanced_rows(sizes: list[tuple], row_length: int) -> list[list[int]]:
    """Examples -> rows of about row_length tokens and nearly equal length, so that little padding is needed.

    A size has one number for a decoder, two (source, target) for an encoder-decoder. Several numbers of rows
    are tried, since 64 examples fill 8 rows evenly but not 10; the one that computes the fewest tokens is
    taken.
    """
    sizes = np.array(sizes)
    wanted = max(1, round((sizes.sum(0) / row_length).max()))
    tries = {min(len(sizes), n) for n in range(-(-3 * wanted // 4), 5 * wanted // 4 + 2)}
    return min((_spread(sizes, n) for n in sorted(tries)),
               key=lambda rows: len(rows) * np.max([sizes[row].sum(0) for row in rows], axis=0).sum())


def _spread(sizes: np.ndarray, n_rows: int) -> list[list[int]]:
    """The largest example first, each to the row with the least load (the larger of its two shares)."""
    shares = (sizes / sizes.sum(0)).tolist()
    loads, rows = [[0.0] * sizes.shape[1] for _ in range(n_rows)], [[] for _ in range(n_rows)]
    for i in sorted(range(len(sizes)), key=lambda i: -max(shares[i])):
        row = min(range(n_rows), key=lambda r: max(load + share for load, share in zip(loads[r], shares[i])))
        loads[row] = [load + share for load, share in zip(loads[row], shares[i])]
        rows[row].append(i)
    return rows


def lay_out(examples: list[Example], structure: str, row_length: int, tokenizer: Tokenizer) -> Batch:
    """Pack examples into as few rows as hold them. The targets include their end token, where they have
    one.
    """
    encdec = structure == "encdec"
    lengths = [(1 + len(source), sum(map(len, targets)), len(targets)) for source, targets in examples]
    rows = balanced_rows([(s, t + k) if encdec else (s + t,) for s, t, k in lengths], row_length)
    decoder, encoder = _Columns(len(rows)), _Columns(len(rows))
    for b, row in enumerate(rows):
        for i in row:
            source, targets = examples[i]
            (encoder if encdec else decoder).add(b, [tokenizer.bos] + source, start=0, document=i, part=0)
            for k, target in enumerate(targets, start=1):
                if encdec:
                    decoder.add(b, [tokenizer.bos] + target, start=0, document=i, part=k)
                else:
                    decoder.add(b, target, start=1 + len(source), document=i, part=k)
    tokens, positions, document, part = decoder.tensors(tokenizer.pad)
    following, next_document, next_part = (torch.roll(x, -1, dims=1) for x in (tokens, document, part))
    follows = (document >= 0) & (next_document == document)
    follows[:, -1] = False
    last = (document >= 0) & (part > 0) & ~(follows & (next_part == part))
    # subtle: a source is followed by its first target alone: a loss over tokens wants one target per example
    counted = follows & (next_part > 0) & ((next_part == part) | (part == 0))
    extra = encoder.tensors(tokenizer.pad)[:3] if encdec else (None, None, None)
    one_per_row = all(len(row) == 1 for row in rows) and all(k == 1 for _, _, k in lengths)
    return Batch(tokens, following, counted, positions, document, part, last, *extra, one_per_row=one_per_row)


def show(example: Example, structure: str, tokenizer: Tokenizer) -> str:
    """An example as the model reads it, the tokens that are predicted and counted between [[ and ]]."""
    batch = lay_out([example], structure, 1, tokenizer)
    counted = torch.roll(batch.loss_mask, 1, dims=1)[0].tolist()
    text = "" if batch.source is None else tokenizer.encoding.decode(batch.source[0].tolist()) + " => "
    for token, now, before in zip(batch.tokens[0].tolist(), counted, [False] + counted):
        text += "]]" * (before and not now) + "[[" * (now and not before) + tokenizer.encoding.decode([token])
    return text + "]]" * counted[-1]


class _Columns:
    """Rows of tokens under construction, and their three integers per token."""

    def __init__(self, n_rows: int):
        self.rows = [([], [], [], []) for _ in range(n_rows)]

    def add(self, b: int, tokens: list[int], start: int, document: int, part: int) -> None:
        for column, new in zip(self.rows[b], (tokens, range(start, start + len(tokens)),
                                              [document] * len(tokens), [part] * len(tokens))):
            column.extend(new)

    def tensors(self, pad: int) -> list[Tensor]:
        """tokens, positions, document, part: (B, T), padded on the right."""
        T = max(len(row[0]) for row in self.rows)
        return [torch.tensor([row[i] + [filler] * (T - len(row[i])) for row in self.rows])
                for i, filler in enumerate((pad, 0, -1, 0))]


# ---- which examples a step reads: a pure function of (seed, step), so that resuming needs no state ---------

@functools.lru_cache(maxsize=4)
def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def indices_of_step(sizes: np.ndarray, budget: int, seed: int,
                    step: int) -> tuple[np.ndarray, np.random.Generator]:
    """The items that step `step` reads: `budget` worth of sizes, in an order shuffled anew every epoch.

    An epoch holds whole steps; what is left over at its end sits it out. Also returns the step's own
    generator.
    """
    epoch, step_of_epoch = divmod(step, max(1, int(sizes.sum()) // budget))
    order = shuffled(len(sizes), seed, epoch)
    ends = np.cumsum(sizes[order])
    bounds = [step_of_epoch * budget, (step_of_epoch + 1) * budget]
    first, after = np.searchsorted(ends, bounds, side="right")
    return order[first:max(after, first + 1)], np.random.default_rng((seed, epoch, step))


# ---- tokens of a corpus ------------------------------------------------------------------------------------

def texts_of(records: list[Record]) -> list[str]:
    """What pretraining reads: the text, or a pair as one text."""
    return [record.text or record.prompt + record.response for record in records]


def tokenizer_for(records: list[Record], vocab: int) -> Tokenizer:
    """A tokenizer trained on these texts, cached by their content."""
    texts = texts_of(records)
    key = hashlib.sha256("\0".join([*texts, str(vocab), PATTERN, *SPECIALS]).encode()).hexdigest()[:16]
    cached = CACHE / f"bpe-{key}.tiktoken"
    if not cached.exists():
        Tokenizer(train_bpe(texts, vocab)).save(cached)
    return Tokenizer.load(cached)


def pieces(tokenizer: Tokenizer, records: list[Record], context: int) -> list[list[int]]:
    """Every text as tokens and its end token, cut into pieces that fit behind <bos> in `context` tokens."""
    cut = []
    for tokens in tokenizer.encode_all(texts_of(records)):
        tokens = tokens + [tokenizer.end]
        cut += [tokens[i:i + context - 1] for i in range(0, len(tokens), context - 1)]
    return cut


def token_rows(tokenizer: Tokenizer, records: list[Record], names: tuple, context: int) -> list[Example]:
    """The named fields of every record as an example: the prompt, and the answers with their end token.

    Records whose prompt and longest answer do not fit behind <bos> in `context` tokens are left out.
    """
    columns = [tokenizer.encode_all([getattr(record, name) for record in records]) for name in names]
    rows = [(prompt, [answer + [tokenizer.end] for answer in answers]) for prompt, *answers in zip(*columns)]
    return [row for row in rows if 1 + len(row[0]) + max(map(len, row[1]), default=1) <= context]


def require(examples: list[list], at_least: int, wanted: str, config) -> None:
    """Both sets must hold something, and the training set one step's worth."""
    if len(examples[0]) < at_least or not examples[1]:
        raise UserError(f"{config.data or 'the default corpus'} gives {len(examples[0]):,} training and "
                        f"{len(examples[1]):,} held-out sequences of at most {config.context} tokens; wanted "
                        f"are {wanted}, {at_least:,} for a step: bring more data, raise context, or lower "
                        "batch_size")


def require_tokens(pieces: list[list[int]], at_least: int, config) -> None:
    n = sum(map(len, pieces))
    if n < at_least:
        raise UserError(f"the text has {n:,} tokens; one step wants batch_size x context = {at_least:,}: "
                        "lower one of them, or bring more text")


@dataclass
class Group:
    """One prompt and its ranked answers; the ranking is all that a reward model sees."""
    prompt: list[int]
    answers: list[list[int]]            # with their end tokens; the human answer first where there is one
    ranking: list[float]                # larger is better; a labeller's score, or 1 chosen and 0 rejected
    human: bool


def by_prompt(values_N: Tensor, batch: Batch) -> Tensor:
    """Values at batch.last, row by row -> (P, K): answer k of prompt p. 0 where a prompt has fewer than K
    answers.
    """
    prompt_N, answer_N = batch.document[batch.last], batch.part[batch.last] - 1
    empty = values_N.new_zeros(int(prompt_N.max()) + 1, int(answer_N.max()) + 1)
    return empty.index_put((prompt_N, answer_N), values_N)


def show_group(group: Group, tokenizer: Tokenizer) -> str:
    """A prompt and its answers, the best first; between [[ ]] the token at which each is scored."""
    order = sorted(range(len(group.answers)), key=lambda k: -group.ranking[k])
    return "\n".join([tokenizer.decode(group.prompt)] + [
        f"{group.ranking[k]:.2f}  {tokenizer.encoding.decode(group.answers[k][:-1])}"
        f"[[{tokenizer.encoding.decode(group.answers[k][-1:])}]]" for k in order])


def preferences(groups: list[Group], tie: float) -> Tensor:
    """(P, K, K) bool: [p, w, l] is True where answer w of prompt p ranks before l; a gap below tie is no
    preference.
    """
    K = max(len(group.ranking) for group in groups)
    ranking_PK = torch.tensor([group.ranking + [float("nan")] * (K - len(group.ranking)) for group in groups])
    return ranking_PK[:, :, None] - ranking_PK[:, None, :] >= tie          # comparisons with nan are False

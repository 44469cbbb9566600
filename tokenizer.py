"""Byte-level BPE: trained here by hand, run by tiktoken, with the hand-written encoder as its tested oracle.

Text that looks like a special token is ordinary text: special tokens are put in by their ids alone.
"""
import base64
import heapq
import json
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import regex                      # comes with tiktoken
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

import hardware
from common import write_atomically
from errors import UserError
from published_tokenizers import Pieces, Renumbered, content_of, text_of

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIALS = ("<pad>", "<bos>", "<end>",
            "<mask>", "<smask>", "<gmask>", "<sop>", "<eop>",        # BART's and GLM's masks; GLM's blanks
            "<R>", "<S>", "<X>",                                     # UL2's modes
            *(f"<extra_{i}>" for i in range(100)))                   # T5's sentinels

SETTINGS = ".settings.json"       # beside tokenizer.tiktoken, where a published tokenizer was imported


def train_bpe(texts: list[str], vocab: int) -> dict[bytes, int]:
    """Byte-pair encoding (Sennrich et al. 2016, algorithm 1): merge the most frequent pair, again and again.

    Returns token bytes -> rank: the 256 bytes, then one merge after another, until ranks and special tokens
    together are `vocab`, or every word of the texts is one token. Ties go to the pair that comes first in
    byte order, so that the result depends on the counts alone. Pair counts are kept up to date instead of
    counted anew: a merge touches only the words that hold the pair.
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
        for new in _merge_pair(words, counts, holders, pair):
            if counts[new] > 0:
                heapq.heappush(heap, (-counts[new], new))
        progress.update()
    progress.close()
    return ranks


def _merge_pair(words: list, counts: Counter, holders: dict, pair: tuple) -> set:
    """Merge `pair` in every word that holds it; returns the pairs that this has made. Only pairs with a
    neighbour of the merged one change.
    """
    (first, second), merged, made = pair, pair[0] + pair[1], set()
    for i in holders.pop(pair):
        word, count = words[i]
        j = 0
        while j + 1 < len(word):
            if word[j] == first and word[j + 1] == second:
                neighbours = []
                if j > 0:
                    counts[word[j - 1], first] -= count
                    neighbours.append((word[j - 1], merged))
                if j + 2 < len(word):
                    counts[second, word[j + 2]] -= count
                    neighbours.append((merged, word[j + 2]))
                for new in neighbours:
                    counts[new] += count
                    holders[new].add(i)
                made.update(neighbours)
                word[j:j + 2] = [merged]
            j += 1
    counts.pop(pair, None)
    return made


def encode_by_hand(text: str, ranks: dict[bytes, int]) -> list[int]:
    """What tiktoken computes: the tokens of each word."""
    return [ranks[part] for word in regex.findall(PATTERN, text)
            for part in merge_word(word.encode(), ranks, len(ranks))]


def merge_word(word: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Merge the adjacent pair of lowest rank until no pair makes a token of a rank below `below`."""
    parts = [bytes([b]) for b in word]
    while len(parts) > 1:
        rank, j = min((ranks.get(a + b, below), j) for j, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank >= below:
            break
        parts[j:j + 2] = [parts[j] + parts[j + 1]]
    return parts


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token was merged from, in the order of the ranks: what the merges before it leave of
    the token. (A token that they leave in more parts is never reached: it has none.)
    """
    pairs = (merge_word(token, ranks, below=rank) for token, rank in ranks.items() if len(token) > 1)
    return [tuple(pair) for pair in pairs if len(pair) == 2]


def own_settings(ranks: dict[bytes, int]) -> dict:
    """What Tokenizer is told about a vocabulary trained here: special tokens follow the ranks."""
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    return {"pattern": PATTERN, "specials": specials, "pad": specials["<pad>"], "end": specials["<end>"],
            "begin": [specials["<bos>"]], "source_end": [], "target_begin": [],
            "sentinels": [specials[f"<extra_{i}>"] for i in range(100)]}


class Tokenizer:
    """An encoding and the ids of the special tokens. `frame` says what stands around a source and before a
    target; published tokenizers have other settings for it than ours (published_tokenizers.py).
    """

    def __init__(self, ranks: dict[bytes, int], settings: dict | None = None):
        self.ranks, self.settings = ranks, settings
        use = settings or own_settings(ranks)
        self.specials = use["specials"]                              # name -> id
        self.pad, self.end, self.sentinels = use["pad"], use["end"], use["sentinels"]
        self.begin, self.source_end, self.target_begin = use["begin"], use["source_end"], use["target_begin"]
        if self.target_begin == self.begin:          # as older imports kept it; in a row it would stand twice
            self.target_begin = []
        self.bos = (self.begin or self.target_begin)[0]
        self.around = len(self.begin + self.source_end + self.target_begin)      # tokens of a decoder's frame
        ids, self.text = use.get("ids"), {rank: token for token, rank in ranks.items()}
        if "package" in use:
            self.encoding = Pieces(use["package"], self.specials)
            self.text = {rank: text_of(piece, use["package"]) for rank, piece in self.text.items()}
        else:
            self.encoding = tiktoken.Encoding("ours", pat_str=use["pattern"] or PATTERN,
                                              mergeable_ranks=ranks,
                                              special_tokens={} if ids else self.specials)
        if ids:
            self.encoding = Renumbered(self.encoding, ids, self.specials)
            self.text = {ids[rank]: token for rank, token in self.text.items()}
        for token in self.specials.values():
            self.text.pop(token, None)
        self.vocab = 1 + max(*self.text, *self.specials.values())

    def frame(self, structure: str) -> tuple[list[int], list[int], list[int]]:
        """(before a source, after it, before a target). Ours: <bos> source target in the row of a decoder,
        and another <bos> where a target has a decoder of its own.
        """
        opened = self.target_begin or [self.bos] * (structure == "encdec")
        return self.begin, self.source_end, opened

    def special(self, word: str) -> int | None:
        """A special token's id; published tokenizers write [MASK] and sop for <mask> and <sop>."""
        bare = word.strip("<>")
        spellings = (word, f"[{bare.replace('mask', 'MASK')}]", bare)
        return next((self.specials[w] for w in spellings if w in self.specials), None)

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text. A thread takes 500 texts at a time: one by one, short texts cost more to
        hand out than to encode.
        """
        with ThreadPoolExecutor(hardware.cores()) as pool:
            parts = pool.map(lambda i: [self.encode(text) for text in texts[i:i + 500]],
                             range(0, len(texts), 500))
            return [tokens for part in parts for tokens in part]

    def decode(self, tokens: list[int]) -> str:
        """The text of an answer: without the end token and what may follow it."""
        tokens = list(tokens)
        return self.encoding.decode(tokens[:tokens.index(self.end)] if self.end in tokens else tokens)

    def sentence_ends(self) -> set[int]:
        """Tokens that end a sentence. <end> is one of them: it stays with the sentence before it."""
        ends = {i for i, text in self.text.items() if text.rstrip()[-1:] in (b".", b"!", b"?")}
        return ends | {self.end}

    def bytes_per_token(self) -> Tensor:
        """(V,) how many bytes of text each token stands for; a special token stands for none."""
        sizes = torch.zeros(self.vocab, dtype=torch.long)
        for i, text in self.text.items():
            sizes[i] = len(text)
        return sizes

    def save(self, path: Path) -> None:
        """tokenizer.tiktoken: a token and its rank a line; beside it the settings, if they are not ours."""
        lines = (base64.b64encode(token) + b" %d" % rank for token, rank in self.ranks.items())
        write_atomically(path, b"\n".join(lines) + b"\n")
        beside = Path(path).with_suffix(SETTINGS)
        if self.settings:
            write_atomically(beside, json.dumps(self.settings).encode())
        else:
            beside.unlink(missing_ok=True)

    def published(self) -> dict:
        """The content of a tokenizer.json, as other libraries read it."""
        settings = self.settings or {}
        if "package" in settings:
            return settings["package"]
        ids = settings.get("ids") or list(self.ranks.values())
        return content_of(self, ids, merges_of(self.ranks), settings.get("pattern") or PATTERN)

    @staticmethod
    def load(path: Path) -> "Tokenizer":
        lines = (line.split() for line in Path(path).read_bytes().splitlines())
        beside = Path(path).with_suffix(SETTINGS)
        settings = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else None
        return Tokenizer({base64.b64decode(token): int(rank) for token, rank in lines}, settings)

"""From records to batches: tokens, the layout of (source, target) pairs in rows, and what each step reads.

    Record --encode--> tokens --objective--> (source, target) --lay_out--> Batch --masks.of_batch--> model
"""
import functools
import hashlib
from dataclasses import dataclass, fields
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

import common
import objectives
from corpus import Record
from errors import UserError
from tokenizer import PATTERN, SPECIALS, Tokenizer, train_bpe

# ---- layout: examples -> Batch -----------------------------------------------------------------------------

class Example(NamedTuple):
    """What lay_out puts into a row."""
    source: list[int]
    targets: list[list[int]]             # one, or several answers to a prompt that do not see each other
    blanks: tuple = ()                   # GLM: for each span of the target the index in source of its mask
    ranking: tuple = ()                  # of the targets, larger is better: a labeller's score, or 1 and 0
    human: bool = False                  # in a ranking: the first target was written by a person


@dataclass
class Batch:
    """Named tensors of packed rows: what the model reads, where the loss counts. All (B, T), source* (B, S).

    A decoder's row is <bos> source target; an encoder-decoder has <bos> source in `source` and <bos> target
    here. The whole target is in the row, its last token too (there the reward is read), although nothing
    follows it.
    """
    tokens: Tensor
    targets: Tensor              # the token that the logits of each token predict
    loss_mask: Tensor            # True where that is a target token
    source_mask: Tensor          # True where that is a source token
    positions: Tensor            # restart at every document; every target begins where the source ended
    positions_2d: Tensor         # (2, B, T): place in the source (or that of the blank), place in the target
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
    return batch.loss_mask + (source_weight if structure == "causal" else 0.0) * batch.source_mask


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
    """Pack examples into as few rows as hold them. Targets include their end token, where they have one."""
    encdec = structure == "encdec"
    lengths = [(1 + len(source), sum(map(len, targets)), len(targets)) for source, targets, *_ in examples]
    packed = balanced_rows([(s, t + k) if encdec else (s + t,) for s, t, k in lengths], row_length)
    decoder, encoder = [_Row() for _ in packed], [_Row() for _ in packed]
    for row, source_row, chosen in zip(decoder, encoder if encdec else decoder, packed):
        for i in chosen:
            source, targets, blanks = Example(*examples[i])[:3]
            first = targets[0][0] if targets and targets[0] and not blanks else None
            source_row.add_source(i, [tokenizer.bos] + source, follows=None if encdec else first)
            for k, target in enumerate(targets, start=1):
                row.add_target(i, k, target, blanks, 0 if encdec else len(source), tokenizer, begin=encdec)
    columns = _tensors(decoder, tokenizer.pad)
    columns["positions"] = columns["positions_2d"].sum(0)
    if encdec:
        of_source = _tensors(encoder, tokenizer.pad)
        columns |= {"source": of_source["tokens"], "source_document": of_source["document"],
                    "source_positions": of_source["positions_2d"][0]}
    one_per_row = all(len(chosen) == 1 for chosen in packed) and all(k == 1 for _, _, k in lengths)
    return Batch(**columns, one_per_row=one_per_row)


class _Row:
    """A row of tokens under construction: a list a column, one entry a token."""

    def __init__(self):
        names = "tokens targets loss_mask source_mask place block document part last"
        self.columns = {name: [] for name in names.split()}

    def add(self, **columns: list) -> None:
        for name, values in columns.items():
            self.columns[name] += values

    def add_source(self, document: int, tokens: list[int], follows: int | None) -> None:
        """follows: the first token of the target, which the last source token predicts, or None."""
        n, counted = len(tokens), follows is not None
        self.add(tokens=tokens, targets=tokens[1:] + [follows or 0], source_mask=[True] * (n - 1) + [False],
                 loss_mask=[False] * (n - 1) + [counted], place=list(range(n)), block=[0] * n,
                 document=[document] * n, part=[0] * n, last=[False] * n)

    def add_target(self, document: int, part: int, target: list[int], blanks: tuple, start: int,
                   tokenizer: Tokenizer, begin: bool) -> None:
        """start: the place of the last source token. begin: with <bos> in front, as a decoder has it.

        A target of blanks holds <sop> span <eop> for each. It reads no <eop> and predicts no <sop>; a span
        stands at the place of its mask (GLM, Du et al. 2022, section 2.1).
        """
        if blanks:
            tokens = [token for token in target if token != tokenizer.specials["<eop>"]]
            following = [token for token in target if token != tokenizer.specials["<sop>"]]
            spans = np.cumsum([token == tokenizer.specials["<sop>"] for token in tokens]) - 1
            place = [blanks[span] + 1 for span in spans]
            block = [i - place.index(at) + 1 for i, at in enumerate(place)]
        else:
            tokens = [tokenizer.bos] * begin + target
            following, place = tokens[1:], [start] * len(tokens)
            block = list(range(1 - begin, 1 - begin + len(tokens)))
        n, n_following = len(tokens), len(following)
        self.add(tokens=tokens, targets=following + [0] * (n - n_following), source_mask=[False] * n,
                 loss_mask=[True] * n_following + [False] * (n - n_following), place=place, block=block,
                 document=[document] * n, part=[part] * n, last=([False] * (n - 1) + [True])[:n])


def _tensors(rows: list[_Row], pad: int) -> dict[str, Tensor]:
    """The columns of all rows as (B, T) tensors, padded on the right."""
    T = max(len(row.columns["tokens"]) for row in rows)
    filler = {"tokens": pad, "document": -1, "loss_mask": False, "source_mask": False, "last": False}
    found = {name: torch.tensor([row.columns[name] + [filler.get(name, 0)] * (T - len(row.columns[name]))
                                 for row in rows]) for name in rows[0].columns}
    positions_2d = torch.stack((found.pop("place"), found.pop("block")))
    return {**found, "positions_2d": positions_2d}


def show(example: Example, structure: str, tokenizer: Tokenizer) -> str:
    """An example as the model reads it: the source, and between [[ and ]] what is predicted and counted."""
    if example.ranking:
        return show_ranking(example, tokenizer)
    batch, decode = lay_out([example], structure, 1, tokenizer), tokenizer.encoding.decode
    read = batch.tokens[batch.part == 0] if structure != "encdec" else batch.source[0]
    between = " => " if structure == "encdec" else ""
    return f"{decode(read.tolist())}{between}[[{decode(batch.targets[batch.loss_mask].tolist())}]]"


def show_ranking(example: Example, tokenizer: Tokenizer) -> str:
    """A prompt and its answers, the best first; between [[ ]] the token at which each is scored."""
    decode = tokenizer.encoding.decode
    order = sorted(range(len(example.targets)), key=lambda k: -example.ranking[k])
    return "\n".join([tokenizer.decode(example.source)] + [
        f"{example.ranking[k]:.2f}  {decode(example.targets[k][:-1])}[[{decode(example.targets[k][-1:])}]]"
        for k in order])


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

def objective_of(name: str, tokenizer: Tokenizer) -> Callable:
    """The function (tokens of a text, generator) -> Example of that name in objectives.py."""
    known = {"next_token": objectives.next_token, "prefix_lm": objectives.prefix_lm,
             "span_corruption": functools.partial(objectives.span_corruption, sentinels=tokenizer.sentinels)}
    if name not in known:
        raise UserError(f"objective is {name!r}; it must be one of {', '.join(known)}")

    def example(text: list[int], rng: np.random.Generator) -> Example:
        source, target, *blanks = known[name](text, rng)
        return Example(source, [target], *blanks)
    return example


BPE_CHARACTERS = 6_000_000


def texts_of(records: list[Record]) -> list[str]:
    """What pretraining reads: the text, or a pair as one text."""
    return [record.text or record.prompt + record.response for record in records]


def tokenizer_for(records: list[Record], vocab: int) -> Tokenizer:
    """A tokenizer trained on these texts, cached by their content. Of much text an even sample is enough."""
    texts = texts_of(records)
    key = hashlib.sha256("\0".join([*texts, str(vocab), PATTERN, *SPECIALS]).encode()).hexdigest()[:16]
    cached = common.CACHE / f"bpe-{key}.tiktoken"
    with common.rank_zero_first():
        if not cached.exists():
            every = 1 + sum(map(len, texts)) // BPE_CHARACTERS
            Tokenizer(train_bpe(texts[::every], vocab)).save(cached)
    return Tokenizer.load(cached)


def pieces(tokenizer: Tokenizer, records: list[Record], context: int) -> list[list[int]]:
    """Every text as tokens and its end token, cut into pieces that fit behind <bos> in `context` tokens."""
    cut = []
    for tokens in tokenizer.encode_all(texts_of(records)):
        tokens = tokens + [tokenizer.end]
        cut += [tokens[i:i + context - 1] for i in range(0, len(tokens), context - 1)]
    return cut


def token_rows(run: common.Run, tokenizer: Tokenizer, records: list[Record], names: tuple,
               context: int) -> list[Example]:
    """The named fields of every record as an example: the prompt, and the answers with their end token.

    Records whose prompt and longest answer do not fit behind <bos> in `context` tokens are dropped, and said.
    """
    columns = [tokenizer.encode_all([getattr(record, name) for record in records]) for name in names]
    rows = [Example(prompt, [answer + [tokenizer.end] for answer in answers])
            for prompt, *answers in zip(*columns)]
    kept = [row for row in rows if 1 + len(row.source) + max(map(len, row.targets), default=1) <= context]
    if len(kept) < len(rows):
        run.print(f"{len(rows) - len(kept):,} of {len(rows):,} {' + '.join(names)} have more than {context} "
                  "tokens and are dropped")
    return kept


def require(examples: list[list], at_least: int, config, wanted: str) -> None:
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


def by_prompt(values_N: Tensor, batch: Batch) -> Tensor:
    """Values at batch.last, row by row -> (P, K): answer k of prompt p. 0 where a prompt has fewer than K
    answers.
    """
    prompt_N, answer_N = batch.document[batch.last], batch.part[batch.last] - 1
    empty = values_N.new_zeros(int(prompt_N.max()) + 1, int(answer_N.max()) + 1)
    return empty.index_put((prompt_N, answer_N), values_N)


def preferences(examples: list[Example], tie: float) -> Tensor:
    """(P, K, K) bool: [p, w, l] is True where answer w of prompt p ranks before l; a gap below tie is no
    preference.
    """
    K = max(len(example.ranking) for example in examples)
    ranking_PK = torch.tensor([list(example.ranking) + [float("nan")] * (K - len(example.ranking))
                               for example in examples])
    return ranking_PK[:, :, None] - ranking_PK[:, None, :] >= tie          # comparisons with nan are False

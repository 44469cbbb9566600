"""From records to batches: tokens, the layout of (source, target) pairs in rows, and what each step reads.

    Record --encode--> tokens --objective--> (source, target) --lay_out--> Batch --masks.of_batch--> model
"""
import hashlib
import inspect
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

import common
import objectives
from corpus import Record
from errors import UserError
from model import few_sizes
from tokenizer import Tokenizer, train_bpe

# ---- layout: examples -> Batch -----------------------------------------------------------------------------

class Example(NamedTuple):
    """What lay_out puts into a row."""
    source: list[int]
    targets: list[list[int]]             # one, or several answers to a prompt that do not see each other
    blanks: tuple = ()                   # GLM: for each span of the target the index in source of its mask
    ranking: tuple = ()                  # of the targets, larger is better: a labeller's score, or 1 and 0
    human: bool = False                  # in a ranking: the first target was written by a person
    origin: str = ""                     # of a comparison: the file or source that it came from
    mistakes: tuple = ()                 # pairs (w, l) of targets that the labeller takes for l before w
    side_by_side: bool = False           # each target has a copy of the last source token in front


@dataclass
class Batch:
    """Named tensors of packed rows: what the model reads, where the loss counts. All (B, T), source* (B, S).

    A decoder's row is <bos> source target; an encoder-decoder has <bos> source in `source` and <bos> target
    here (a published tokenizer may have other tokens there: Tokenizer.frame). The whole target is in the row,
    its last token too (there the reward is read), although nothing follows it.
    """
    tokens: Tensor
    targets: Tensor              # the token that the logits of each token predict
    loss_mask: Tensor            # True where that is a target token
    source_mask: Tensor          # True where that is a source token
    positions: Tensor            # restart at every document; every target begins where the source ended
    positions_2d: Tensor         # (2, B, T): place in the source (of the blank; encdec: -1) and in the target
    document: Tensor             # index of the example in the batch, -1: padding
    part: Tensor                 # 0: source, k: k-th target
    last: Tensor                 # True at the last token of each target
    source: Tensor | None = None
    source_positions: Tensor | None = None
    source_document: Tensor | None = None
    one_per_row: bool = False    # every row holds one source with one target

    def to(self, device) -> "Batch":
        return Batch(**{name: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x
                        for name, x in vars(self).items()})

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
    """Examples -> rows of nearly equal length, so that little padding is needed, and of about row_length
    tokens: 4/5 of it to 3/2 on average, to 5/2 where a size has two numbers, which are harder to balance.

    A size has one number for a decoder, two (source, target) for an encoder-decoder. Several numbers of rows
    are tried, since 64 examples fill 8 rows evenly but not 10; the one that computes the fewest tokens is
    taken. Where all examples are of one size, as pieces of a long text are, several numbers may compute as
    few: then the largest, since shorter rows attend to less.
    """
    sizes = np.array(sizes)
    wanted = (sizes.sum(0) / row_length).max()
    fewest = math.ceil(2 * wanted / (5 if sizes.shape[1] == 2 else 3))
    tries = {min(len(sizes), n) for n in range(fewest, int(5 * wanted / 4) + 2)}
    alike = bool((sizes == sizes[0]).all())
    return min((_spread(sizes, n) for n in sorted(tries, reverse=alike)), key=lambda rows: len(rows) * sum(
        few_sizes(int(n)) for n in np.max([sizes[row].sum(0) for row in rows], axis=0)))


def _spread(sizes: np.ndarray, n_rows: int) -> list[list[int]]:
    """The largest example first, each to the row with the least load (the larger of its two shares)."""
    shares = sizes / sizes.sum(0)
    loads, rows = np.zeros((n_rows, sizes.shape[1])), [[] for _ in range(n_rows)]
    for i in np.argsort(-shares.max(1), kind="stable").tolist():
        row = int((loads + shares[i]).max(1).argmin())
        loads[row] += shares[i]
        rows[row].append(i)
    return rows


def lay_out(examples: list[Example], structure: str, row_length: int, tokenizer: Tokenizer) -> Batch:
    """Pack examples into rows of about row_length tokens, as balanced_rows does. Targets include their end
    token, where they have one.

    The last source token of a decoder predicts the first token of the first target alone, unless they are
    side_by_side.
    """
    encdec = structure == "encdec"
    framed = [_framed(example, structure, tokenizer) for example in examples]
    lengths = [(len(source), sum(len(opened + target) for target in example.targets), len(example.targets))
               for (source, opened, _), example in zip(framed, examples)]
    packed = balanced_rows([(s, t) if encdec else (s + t,) for s, t, _ in lengths], row_length)
    decoder, encoder = _Rows(len(packed), tokenizer), _Rows(len(packed), tokenizer)
    for b, chosen in enumerate(packed):
        for i in chosen:
            (source, opened, copied), targets, blanks = framed[i], examples[i].targets, examples[i].blanks
            adjoins = targets and targets[0] and not blanks and not opened
            (encoder if encdec else decoder).add_source(b, i, source, targets[0][0] if adjoins else None)
            before = -1 if encdec else len(source) + copied - 1    # place of the last source token, if any
            for k, target in enumerate(targets, start=1):
                decoder.add_target(b, i, k, target, blanks, before, opened, copied)
    columns = decoder.tensors()
    columns["positions"] = columns["positions_2d"].sum(0)
    if encdec:
        of_source = encoder.tensors()
        columns |= {"source": of_source["tokens"], "source_document": of_source["document"],
                    "source_positions": of_source["positions_2d"][0]}
    one_per_row = all(len(chosen) == 1 for chosen in packed) and all(k == 1 for _, _, k in lengths)
    return Batch(**columns, one_per_row=one_per_row)


def _framed(example: Example, structure: str, tokenizer: Tokenizer) -> tuple[list[int], list[int], bool]:
    """(the source as a row has it, what stands before each target, whether that is the last source token)."""
    begin, source_end, opened = tokenizer.frame(structure)
    source = begin + example.source + ([] if example.blanks else source_end)  # blanks: it holds masks
    if opened or not example.side_by_side:
        return source, opened, False
    return source[:-1], source[-1:], True


def answers_of_prompts(prompts: list[list[int]], answers: list[list[int]], structure: str, row_length: int,
                       tokenizer: Tokenizer) -> list[Example]:
    """Examples in which every token of every answer is predicted. Neighbours in the list that answer the same
    prompt share its tokens, and are side by side after it, as many as row_length has room for.

    A decoder predicts the first token of an answer at the last one of its prompt. For several answers that
    token is repeated, in front of each; under the causal mask this changes nothing. In a prefix decoder the
    prompt sees that token, which so must stay in it, and a copy would see it twice: there (unless answers
    begin with a token of their own) each answer has the prompt for itself.
    """
    if structure == "prefix" and not tokenizer.frame(structure)[2]:
        return [Example(prompt, [answer]) for prompt, answer in zip(prompts, answers)]
    examples, used = [], 0
    for prompt, answer in zip(prompts, answers):
        if examples and examples[-1].source == prompt and used + len(answer) < row_length:
            examples[-1].targets.append(answer)
        else:
            examples.append(Example(prompt, [answer]))
            used = len(prompt)
        used += 1 + len(answer)
    return [example._replace(side_by_side=len(example.targets) > 1) for example in examples]


class _Rows:
    """Packed rows under construction: pieces of them, and the columns of each piece, one entry a token."""

    def __init__(self, n_rows: int, tokenizer: Tokenizer):
        self.filler = {"tokens": tokenizer.pad, "targets": 0, "loss_mask": False, "source_mask": False,
                       "place": 0, "block": 0, "document": -1, "part": 0, "last": False}
        self.ends, self.pieces, self.tokenizer = [0] * n_rows, [], tokenizer

    def add(self, row: int, n: int, **columns) -> None:
        """A piece of n tokens at the end of a row. A column is a list, or a value for all of them."""
        self.pieces.append((row, slice(self.ends[row], self.ends[row] + n), columns))
        self.ends[row] += n

    def add_source(self, row: int, document: int, source: list[int], follows: int | None) -> None:
        """follows: the first token of the target, which the last source token predicts, or None."""
        n, counted = len(source), follows is not None
        self.add(row, n, tokens=source, targets=source[1:] + [follows or 0],
                 source_mask=[True] * (n - 1) + [False], loss_mask=[False] * (n - 1) + [counted],
                 place=range(n), document=document)

    def add_target(self, row: int, document: int, part: int, target: list[int], blanks: tuple, place: int,
                   begin: list[int], copied: bool) -> None:
        """place: of the last source token. begin: what the target has in front; copied: that token, which
        stands at its own place, 0 steps into the target instead of 1.

        A target of blanks holds <sop> span <eop> for each. It reads no <eop> and predicts no <sop>; a span
        stands at the place of its mask (GLM, Du et al. 2022, section 2.2.1).
        """
        if blanks:
            sop, eop = self.tokenizer.special("<sop>"), self.tokenizer.special("<eop>")
            tokens, following = [t for t in target if t != eop], [t for t in target if t != sop]
            first = len(self.tokenizer.begin)
            span_of = np.cumsum([token == sop for token in tokens]) - 1
            place = [blanks[span] + first for span in span_of]
            block = [i - place.index(at) + 1 for i, at in enumerate(place)]
        else:
            tokens, first = begin + target, 0 if copied else 1
            following, block = tokens[1:], range(first, first + len(tokens))
        n, counted, given = len(tokens), len(following), 0 if blanks else len(begin[1:])
        self.add(row, n, tokens=tokens, targets=following + [0] * (n - counted), place=place, block=block,
                 loss_mask=[False] * given + [True] * (counted - given) + [False] * (n - counted),
                 document=document, part=part,
                 last=[False] * (n - 1) + [True] if n else [])

    def tensors(self) -> dict[str, Tensor]:
        """Every column (B, T), padded on the right; place and block as positions_2d (2, B, T)."""
        shape = (len(self.ends), few_sizes(max(self.ends)))
        arrays = {name: np.full(shape, value) for name, value in self.filler.items()}
        for row, where, columns in self.pieces:
            for name, value in columns.items():
                arrays[name][row, where] = value
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        positions_2d = torch.stack((tensors.pop("place"), tensors.pop("block")))
        return {**tensors, "positions_2d": positions_2d}


def with_prompts(examples: list[Example], structure: str) -> list[Example]:
    """To be continued: of a text without a source, as a decoder learns it, the first half becomes one."""
    def halved(text: list[int]) -> Example:
        return Example(text[:len(text) // 2], [text[len(text) // 2:]])
    return [example if example.source or structure == "encdec" else halved(example.targets[0])
            for example in examples]


def show(example: Example, structure: str, tokenizer: Tokenizer) -> str:
    """An example as the model reads it: the source, and between [[ and ]] what is predicted and counted."""
    if example.ranking:
        return show_ranking(example, tokenizer)
    batch, decode = lay_out([example], structure, 1, tokenizer), tokenizer.encoding.decode
    if structure == "encdec":
        read, between = batch.source[batch.source_document >= 0].tolist(), " => "
    else:
        opened = [] if example.blanks else tokenizer.frame(structure)[2]
        read, between = batch.tokens[(batch.part == 0) & (batch.document >= 0)].tolist() + opened, ""
    return f"{decode(read)}{between}[[{decode(batch.targets[batch.loss_mask].tolist())}]]"


def show_ranking(example: Example, tokenizer: Tokenizer, start: int = -1) -> str:
    """A prompt and its answers, the best first; between [[ ]] the tokens from `start` on, where each is
    scored: the last one, or with 0 all of them.
    """
    decode = tokenizer.encoding.decode
    best_first = sorted(zip(example.ranking, example.targets), key=lambda answer: -answer[0])
    return "\n".join([tokenizer.decode(example.source)] + [
        f"{rank:.2f}  {decode(target[:start])}[[{decode(target[start:])}]]" for rank, target in best_first])


# ---- which examples a step reads: a pure function of (seed, step), so that resuming needs no state ---------

@lru_cache(maxsize=4)
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

def density_and_span(name: str, rest: list[str]) -> tuple[float, float]:
    """Of "span_corruption:0.5:10" the last two; T5's choice, 0.15 and 3, where they are left out."""
    try:
        density, mean_span = map(float, rest or (0.15, 3.0))
    except ValueError:
        density = mean_span = 0.0
    if (rest and name != "span_corruption") or not 0 < density < 1 <= mean_span:
        raise UserError(f"objective is {':'.join([name, *rest])!r}; two numbers may follow span_corruption "
                        "alone, the share of noise and its spans' mean length, as in span_corruption:0.5:10")
    return density, mean_span


@lru_cache(maxsize=4)                    # asked for at every step
def objective_of(name: str, tokenizer: Tokenizer, context: int) -> Callable:
    """The function (tokens of a text, generator) -> Example of that name in objectives.py, given this
    tokenizer's special tokens. Texts have fewer than `context` tokens.

    span_corruption:0.5:10 corrupts half of the tokens, in spans of 10 on average (Raffel et al. 2020, tables
    6 and 7); span_corruption alone is 0.15 and 3.
    """
    o, sentinels, ends = objectives, tokenizer.sentinels, tokenizer.sentence_ends()
    name, *rest = name.split(":")
    density, mean_span = density_and_span(name, rest)

    def special(word: str) -> int:
        if (found := tokenizer.special(word)) is None:
            raise UserError(f"{name} wants a token {word}, which this tokenizer does not have")
        return found

    def using(function: Callable, *words: str, **settings) -> Callable:
        """The objective with its special tokens: <mask> is its argument mask."""
        return partial(function, **{word.strip("<>"): special(word) for word in words}, **settings)

    def bart(noise: Callable, *words: str, **settings) -> Callable:
        return partial(o.keep_end, noise=using(noise, *words, **settings), end=tokenizer.end)

    def ul2(**settings) -> Callable:
        modes = {mode: special(f"<{mode}>") for mode in "RSX"}
        return partial(o.ul2, sentinels=sentinels, modes=modes, **settings)

    blanks = ("<sop>", "<eop>")
    known = {"next_token": lambda: o.next_token,
             "prefix_lm": lambda: o.prefix_lm,
             "span_corruption": lambda: partial(o.span_corruption, sentinels=sentinels, density=density,
                                                mean_span=mean_span),
             "bart": lambda: bart(o.bart, "<mask>", ends=ends),
             "text_infilling": lambda: bart(o.text_infilling, "<mask>"),
             "sentence_permutation": lambda: bart(o.sentence_permutation, ends=ends),
             "token_masking": lambda: bart(o.token_masking, "<mask>"),
             "token_deletion": lambda: bart(o.token_deletion),
             "document_rotation": lambda: bart(o.document_rotation),
             "glm_spans": lambda: using(o.glm_spans, "<mask>", *blanks),
             "glm_sentences": lambda: using(o.glm_sentences, "<smask>", *blanks, ends=ends),
             "glm_document": lambda: using(o.glm_document, "<gmask>", *blanks),
             "glm_10b": lambda: using(o.glm_10b, "<mask>", "<smask>", "<gmask>", *blanks, ends=ends),
             "glm_130b": lambda: using(o.glm_130b, "<mask>", "<gmask>", *blanks),
             "ul2": ul2,
             "u_palm": lambda: ul2(denoisers=o.U_PALM)}
    if name not in known:
        raise UserError(f"objective is {name!r}; it must be one of {', '.join(known)}")
    densest = {"span_corruption": (density, mean_span), "ul2": (0.5, 3.0), "u_palm": (0.5, 3.0)}.get(name)
    if densest and o.n_noise_spans(context, *densest)[1] >= len(sentinels):
        raise UserError(f"{name} in a context of {context} needs more than the {len(sentinels)} sentinels "
                        "that the tokenizer has" + "; lower the context" * bool(sentinels))
    objective = known[name]()
    # ChatGLM-6B ends a text with <eop>, as its blanks: the one in which the text ends brings it along
    blanks_end_texts = name.startswith("glm") and tokenizer.special("<eop>") == tokenizer.end

    def example(text: list[int], rng: np.random.Generator) -> Example:
        ended = blanks_end_texts and text[-1:] == [tokenizer.end]
        pair = objective(text[:-1] if ended else text, rng)
        return Example(pair.source, [pair.target], pair.blanks)
    return example


BPE_CHARACTERS = 6_000_000


def texts_of(records: list[Record]) -> list[str]:
    """What pretraining reads: the text, or a pair as one text."""
    return [record.text or record.prompt + (record.response or record.chosen or "") for record in records]


def tokenizer_for(records: list[Record], vocab: int) -> Tokenizer:
    """A tokenizer trained on these texts, cached by their content. Of much text an even sample is enough."""
    texts = texts_of(records)
    trained_by = Path(inspect.getsourcefile(train_bpe)).read_bytes()
    key = hashlib.sha256("\0".join([*texts, str(vocab)]).encode() + trained_by).hexdigest()[:16]
    cached = common.CACHE / f"bpe-{key}.tiktoken"
    with common.rank_zero_first():
        if not cached.exists():
            every = 1 + sum(map(len, texts)) // BPE_CHARACTERS
            Tokenizer(train_bpe(texts[::every], vocab)).save(cached)
    return Tokenizer.load(cached)


def pieces(tokenizer: Tokenizer, records: list[Record], context: int) -> list[list[int]]:
    """Every text as tokens and its end token, cut into pieces that fit into `context` tokens with what stands
    around them.
    """
    if context <= tokenizer.around:
        raise UserError(f"context {context} has no room for text: {tokenizer.around} tokens stand around it")
    cut, room = [], context - tokenizer.around
    for tokens in tokenizer.encode_all(texts_of(records)):
        tokens = tokens + [tokenizer.end]
        cut += [tokens[i:i + room] for i in range(0, len(tokens), room)]
    return cut


def token_rows(run: common.Run, tokenizer: Tokenizer, records: list[Record], names: tuple,
               context: int) -> list[Example]:
    """The named fields of every record as an example: the prompt, and the answers with their end token.

    Records whose prompt and longest answer do not fit into `context` tokens, with what stands around them,
    are dropped, with a note.
    """
    columns = [tokenizer.encode_all([getattr(record, name) for record in records]) for name in names]
    rows = [Example(prompt, [answer + [tokenizer.end] for answer in answers], origin=record.origin)
            for record, prompt, *answers in zip(records, *columns)]
    kept = [row for row in rows
            if tokenizer.around + len(row.source) + max(map(len, row.targets), default=1) <= context]
    if len(kept) < len(rows):
        run.print(f"{len(rows) - len(kept):,} of {len(rows):,} records have more than {context} tokens in "
                  f"{' + '.join(names)} and are dropped")
    return kept


def room_for_prompt(config, tokenizer: Tokenizer) -> int:
    """Tokens of the longest prompt after which an answer of max_new still fits into the context."""
    return config.context - config.max_new - tokenizer.around


def require(examples: list[list], at_least: int, config, wanted: str, most: int = 0) -> None:
    """Both sets must hold something, and the training set one step's worth. most: tokens that a sequence may
    have, where it is not the whole context.
    """
    train, held_out = map(len, examples)
    if train < at_least or not held_out:
        mend = ("bring some, or raise context where none fits" if not train + held_out else
                "bring more of them, raise context, or lower batch_size" if train < at_least else
                "bring at least two different prompts or texts, to hold one out")
        raise UserError(f"{config.data or 'the default corpus'} gives {train:,} training and {held_out:,} "
                        f"held-out sequences of at most {most or config.context} tokens; wanted are "
                        f"{wanted}, {at_least:,} for a step: {mend}")


def answer_of_token(batch: Batch, where_BT: Tensor) -> Tensor:
    """(N,) which answer of the batch each of these tokens writes, counted through all prompts."""
    part_BT = batch.part.clamp(min=1)                # the last prompt token predicts the first one of part 1
    return (batch.document * (part_BT.max() + 1) + part_BT)[where_BT].unique(return_inverse=True)[1]


def by_prompt(values_N: Tensor, batch: Batch) -> Tensor:
    """Values at batch.last, row by row -> (P, K): answer k of prompt p. 0 where a prompt has fewer than K
    answers.
    """
    prompt_N, answer_N = batch.document[batch.last], batch.part[batch.last] - 1
    empty = values_N.new_zeros(int(prompt_N.max()) + 1, int(answer_N.max()) + 1)
    return empty.index_put((prompt_N, answer_N), values_N)


def answer_logprobs(logits_NV: Tensor, batch: Batch, examples: list[Example]) -> Tensor:
    """log p(answer | prompt) (P, K) of all answers, sums over their tokens, from the logits at
    batch.loss_mask. 0 where a prompt has fewer than K answers.
    """
    document_N, part_N = batch.document[batch.loss_mask], batch.part[batch.loss_mask]
    logprobs_N = objectives.token_logprobs(logits_NV, batch.targets[batch.loss_mask])
    empty_PK = logprobs_N.new_zeros(len(examples), max(len(example.targets) for example in examples))
    sums_PK = empty_PK.index_put((document_N, (part_N - 1).clamp(min=0)), logprobs_N, accumulate=True)
    if not (part_N == 0).any():
        return sums_PK
    # subtle: where answers adjoin the prompt, its last token (part 0) predicts the first token of every one,
    # but batch.targets has room for that of the first answer alone; those of the others are looked up here
    others = [(p, k, target[0]) for p, example in enumerate(examples)
              for k, target in enumerate(example.targets) if k > 0]
    p_M, k_M, token_M = torch.tensor(others, device=document_N.device).reshape(-1, 3).long().T
    row_P = torch.empty(len(examples), dtype=torch.long, device=document_N.device)
    row_P[document_N[part_N == 0]] = (part_N == 0).nonzero().squeeze(1)
    firsts_M = objectives.token_logprobs(logits_NV[row_P[p_M]], token_M)
    return sums_PK.index_put((p_M, k_M), firsts_M, accumulate=True)


def preferences(examples: list[Example], tie: float) -> Tensor:
    """(P, K, K) bool: [p, w, l] is True where answer w of prompt p ranks before l.

    A gap below tie is no preference: False both ways, so the pair counts in no loss and in no accuracy. A
    labeller's mistakes are turned round.
    """
    K = max(len(example.ranking) for example in examples)
    ranking_PK = torch.tensor([list(example.ranking) + [float("nan")] * (K - len(example.ranking))
                               for example in examples])
    preference_PKK = ranking_PK[:, :, None] - ranking_PK[:, None, :] >= tie   # comparisons with nan are False
    for p, example in enumerate(examples):
        for w, l in example.mistakes:
            preference_PKK[p, w, l], preference_PKK[p, l, w] = False, True
    return preference_PKK

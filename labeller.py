"""The simulated labeller: the guideline of an editor, as a score. The only file that knows it.

Real labellers rank answers by a written guideline (Ouyang et al. 2022, appendix B.2). Ours ranks one-line
descriptions of functions by PEP 257 and common sense. The reward model never sees this file, only the
rankings; so, as in Gao et al. 2022, we can measure what a real project cannot: whether the reward model is
right, and when PPO begins to exploit it. The weighted mean of the parts, each between 0 and 1, is the gold
score.
"""
import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Iterable

import torch
from torch.nn.utils.rnn import pad_sequence

import common
import data
import objectives
from corpus import Record, function_name, identifier_words
from errors import UserError
from generate import generate_many

WEIGHTS = {"command": 2, "about": 2, "sentence": 1, "length": 1, "words": 1, "no_repetition": 1}
NO_GOLD = ("note: these prompts are no function signatures; gold, the simulated labeller's score, says "
           "nothing about answers to them")
TIE = 0.08                    # a smaller gap between two gold scores is no preference: nothing learns from it

VERBS = set("""
abort accept access accumulate acquire activate adapt add adjust advance align allocate allow analyze
animate annotate append apply approximate arrange assemble assert assign associate attach attempt
authenticate backtrack begin bind block blend bootstrap broadcast buffer build bump bypass cache calculate
call cancel canonicalize cast change check choose clamp clean clear clip clone close coerce collapse collect
combine commit compare compile complete compose compress compute concatenate configure confirm connect
consider consolidate construct consume contract contain continue control convert copy correct count cover
create crop cross cut cycle deactivate debug decide declare decode decompose decompress decorate decrease
decrement deduce define delegate delete derive describe deserialize destroy detach detect determine
differentiate disable discard disconnect discover dispatch display divide do download draw drop dump
duplicate edit emit empty emulate enable encode encrypt end enforce ensure enter enumerate erase escape
establish estimate evaluate examine exchange exclude execute exit expand expect explain export expose extend
extract factor fail fetch fill filter finalize find finish fire fit fix flag flatten flip flush fold follow
force forget fork format forward free freeze fuse gather generate get give go grab group guess guard
guarantee handle hash hide hold identify ignore implement import include increase increment indent index
indicate infer inform initialize inject insert inspect install instantiate integrate interleave interpolate
interpret intersect invalidate invert invoke issue iterate join keep kill label launch lay leave let lex
limit link list listen load localize locate lock log look lookup lower make manage manipulate map mark mask
match materialize measure merge minimize mix modify monitor move multiply mutate negate normalize notify
obtain offset omit open optimize order organize output overload override overwrite pack pad paint parse
partition pass patch pause perform permute pick place plot point poll pop populate position post prepare
prepend present preserve press prevent print probe process produce profile project promote propagate protect
provide prune publish pull purge push put quantize query queue quit quote raise randomize rank read reassign
rebuild recalculate receive recognize recompute reconstruct record recover redirect redraw reduce refer
refine refresh register reindex reject relabel release reload remap remove rename render reorder repeat
replace replay report represent request require rescale reset reshape resize resolve respond restart restore
restrict resume retrieve retry return reuse reverse revert rewind rewrite rotate round route run sample
sanitize save scale scan schedule score scroll search seek select send separate serialize serve set setup
shift show shuffle shut shutdown sign simplify simulate skip sleep slice snap solve sort spawn specify split
squeeze stack start step stop store stream strip submit substitute subtract suggest sum support suppress
suspend swap switch sync synchronize tag take tell terminate test throw tie time toggle tokenize trace track
train transfer transform translate transpose traverse treat trigger trim truncate try tune turn unbind undo
unfold uninstall unlink unlock unpack unquote unregister unset unwrap update upgrade upload use validate
verify view visit vote wait wake walk warn wrap write yield zero
""".split())

STOP_WORDS = set("a an and are as at be by for from if in into is it its of on or that the this to with"
                 .split())


def words_of(line: str) -> list[str]:
    """The words of a line in lower case; identifiers count as the words they are made of."""
    return [word for token in re.findall(r"[A-Za-z0-9_]+", line) for word in identifier_words(token)]


def stem(word: str) -> str:
    """A word without its ending, so that 'converts', 'converted' and 'converter' meet 'convert'."""
    for ending in ("ations", "ation", "ings", "ing", "ions", "ion", "ers", "ies", "er", "ed", "es", "s", "e",
                   "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[:-len(ending)]
    return word


def command(line: str) -> float:
    """The first word is a verb in its base form: "Return …", not "Returns …"."""
    first = re.match(r"[A-Za-z]+", line)
    return float(bool(first) and first.group().lower() in VERBS)


def about(prompt: str, line: str) -> float:
    """Share of the identifier's words, stop words aside, whose stem begins a word of the line."""
    name = identifier_words(function_name(prompt))
    stems = {stem(word) for word in name if word not in STOP_WORDS} or {stem(word) for word in name}
    words = words_of(line)
    return sum(any(word.startswith(wanted) for word in words) for wanted in stems) / max(1, len(stems))


def sentence(line: str) -> float:
    """It begins with a capital, and ends with a full stop: half a point each."""
    return 0.5 * line[:1].isupper() + 0.5 * line.endswith(".")


def length(line: str) -> float:
    """1 for three to ten words, falling to 0 over six more; fewer than three: in proportion."""
    n = len(line.split())
    return min(n / 3, 1.0, max(0.0, (16 - n) / 6))


def known_words(texts: list[str]) -> list[str]:
    """The words that occur at least three times."""
    tokens, counts = Counter(), Counter()
    for text in texts:
        tokens.update(re.findall(r"[A-Za-z0-9_]+", text))
    for token, count in tokens.items():
        for word in identifier_words(token):
            counts[word] += count
    return sorted(word for word, count in counts.items() if count >= 3)


class Labeller:
    """The guideline, with the vocabulary of the training text that "words" asks for."""

    def __init__(self, training_texts: list[str]):
        counted_by = Path(__file__).read_bytes()
        key = hashlib.sha256("\0".join(training_texts).encode() + counted_by).hexdigest()[:16]
        cached = common.CACHE / f"words-{key}.txt"
        with common.rank_zero_first():
            if not cached.exists():
                common.write_atomically(cached, "\n".join(known_words(training_texts)).encode())
        self.known = set(cached.read_text(encoding="utf-8").splitlines())

    def parts(self, prompt: str, line: str) -> dict[str, float]:
        """Every part of the guideline, 0 to 1."""
        words = words_of(line)
        content = [word for word in words if word not in STOP_WORDS]
        return {"command": command(line), "about": about(prompt, line), "sentence": sentence(line),
                "length": length(line),
                "words": (sum(word in self.known for word in words) / max(1, len(words))) ** 2,
                "no_repetition": (len(set(content)) / max(1, len(content))) ** 2}

    def gold(self, prompt: str, line: str) -> float:
        """The gold score: the weighted mean of the parts. An empty line is worth 0."""
        if not line.strip():
            return 0.0
        parts = self.parts(prompt, line.strip())
        return sum(WEIGHTS[name] * value for name, value in parts.items()) / sum(WEIGHTS.values())

    def golds(self, prompts: Iterable[str], lines: Iterable[str]) -> list[float]:
        return [self.gold(prompt, line) for prompt, line in zip(prompts, lines)]


def can_judge(records: list[Record]) -> bool:
    """Whether at least half of the prompts are function signatures: of others the guideline says nothing."""
    return 2 * sum(bool(function_name(record.prompt)) for record in records) >= len(records)


def collect_rankings(config, run, tokenizer, records: list[Record], samplers: list, labeller: Labeller,
                     training: bool) -> list[data.Example]:
    """What a labelling campaign returns: per prompt the human answer and config.answers - 1 samples, ranked.

    In training, config.mismatched human answers to other prompts are ranked among them: these are written
    well and speak about something else, which a reward model must not overlook and samples alone rarely show.
    And a share config.label_noise of the comparisons is in the wrong order.

    Records that bring their own comparison (chosen, rejected) are taken as they are, but for label_noise.
    """
    compared = [r for r in records if r.chosen]
    differ = [r for r in compared if r.chosen != r.rejected]
    if len(differ) < len(compared):
        run.print(f"{len(compared) - len(differ):,} comparisons of an answer with itself are left out")
    given = data.token_rows(run, tokenizer, differ, ("prompt", "chosen", "rejected"), config.context)
    ranked = [row._replace(ranking=(1.0, 0.0)) for row in given]
    pairs = data.token_rows(run, tokenizer, [r for r in records if r.response], ("prompt", "response"),
                            config.context)
    room, n_pairs = data.room_for_prompt(config, tokenizer), len(pairs)
    pairs = [pair for pair in pairs if len(pair.source) <= room]
    if len(pairs) < n_pairs:
        run.print(f"{n_pairs - len(pairs):,} of {n_pairs:,} prompts have more than {room} tokens, leave no "
                  "room for samples and are dropped")
    mismatched = config.mismatched * training
    if training and not can_judge([r for r in records if r.response]):
        run.print("note: these prompts are no function signatures, and the simulated labeller ranks one-line "
                  "descriptions of functions; bring comparisons of your own (prompt + chosen + rejected)")
    samples = samples_of(config, run, tokenizer, [pair.source for pair in pairs], samplers)
    for i, pair in enumerate(pairs):
        others = [pairs[(i + k) % len(pairs)].targets[0][:config.max_new] for k in range(1, mismatched + 1)]
        prompt, answers = tokenizer.decode(pair.source), pair.targets + samples[i] + others
        ranking = tuple(labeller.gold(prompt, tokenizer.decode(answer)) for answer in answers)
        ranked.append(pair._replace(targets=answers, ranking=ranking, human=True))
    return with_mistakes(ranked, config.label_noise, config.seed) if training else ranked


def samples_of(config, run, tokenizer, prompts: list[list[int]], samplers: list) -> list[list[list[int]]]:
    """config.answers - 1 samples to each prompt, in equal shares of the samplers; the first ones may have one
    more.
    """
    n, samples = config.answers - 1, [[] for _ in prompts]
    if len(samplers) > n:
        raise UserError(f"sampler names {len(samplers)} runs, and answers {config.answers} leaves room for "
                        f"{n} samples to a prompt")
    for k, model in enumerate(samplers):
        share = len(range(k, n, len(samplers)))
        drawn = generate_many(run, model, [prompt for prompt in prompts for _ in range(share)], tokenizer,
                              config.max_new, config.temperature, config.seed)
        for i, of_prompt in enumerate(samples):
            of_prompt += drawn[i * share:(i + 1) * share]
    return samples


def with_mistakes(examples: list[data.Example], label_noise: float, seed: int) -> list[data.Example]:
    """The same comparisons by a labeller who gets each the wrong way round with probability label_noise.

    Two people who both err in a share e of pairs agree in (1 - e)^2 + e^2 of them. People were found to agree
    in 73 to 77 % (Ouyang et al. 2022, section 3.4; Stiennon et al. 2020, section 3.3): e is 0.13 to 0.16. A
    tie has no order to be wrong about. The draw is a hash of the seed and of the pair itself, so it is the
    same in whatever order, step or process the pair is read.
    """
    def draw(example: data.Example, w: int, l: int) -> float:
        content = repr((seed, example.source, sorted((example.targets[w], example.targets[l]))))
        return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") / 2 ** 64

    def mistakes(example: data.Example) -> tuple:
        pairs = data.preferences([example], TIE)[0].nonzero().tolist()
        return tuple((w, l) for w, l in pairs if draw(example, w, l) < label_noise)
    return [example._replace(mistakes=mistakes(example)) for example in examples] if label_noise else examples


def agreement(scored: list[tuple[data.Example, list[float]]], sources: Iterable[str] = ()
              ) -> dict[str, float]:
    """How scores of answers agree with their ranking. scored: prompts with their answers, and the scores.

    accuracy: share of pairs in the ranking's order, ties left out; sample against sample, human against
    sample; and, where the data has several sources (those given and those of the prompts), of each with its
    number of pairs, which may be none. length_correlation: Pearson's, of the score and the tokens of an
    answer; reward models are known to like length (Singhal et al. 2023).
    """
    examples, scores = [list(column) for column in zip(*scored)]
    scores = [torch.tensor(row[:len(example.targets)]) for example, row in zip(examples, scores)]
    compared = (pad_sequence(scores, batch_first=True), data.preferences(examples, TIE),
                torch.tensor([example.human for example in examples]))
    counts = dict(zip(("accuracy", "accuracy_sample_sample", "accuracy_human_sample"),
                      objectives.pairwise_accuracy(*compared).tolist()))
    origins = sorted({example.origin for example in examples}.union(sources))
    origins = origins if len(origins) > 1 else []
    for origin in origins:
        here_P = torch.tensor([example.origin == origin for example in examples])
        of_origin = objectives.pairwise_accuracy(*(x[here_P] for x in compared))
        counts[f"accuracy_{origin}"] = of_origin[0].tolist()
    lengths_N = torch.tensor([float(len(target)) for example in examples for target in example.targets])
    return {**{name: right / n for name, (right, n) in counts.items() if n},
            **{f"pairs_{origin}": counts[f"accuracy_{origin}"][1] for origin in origins},
            "length_correlation": float(objectives.correlation(torch.cat(scores), lengths_N))}


def print_sources(run, last: dict[str, float]) -> None:
    """The accuracy on each source of the data, where there are several; of few pairs it says little."""
    for name, n in last.items():
        if name.startswith("pairs_"):
            origin = name.removeprefix("pairs_")
            run.print(f"{origin}: " + (f"accuracy {last[f'accuracy_{origin}']:.3f} on {n:,} held-out pairs"
                                       if n else "no held-out pair, so no accuracy"))

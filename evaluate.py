"""The report: what each stage changed, on functions whose names no stage has seen.

    python evaluate.py      reads runs/pretrain, sft, rm, ppo; writes runs/report.md, report.json, report.png

Rows: the base model, SFT, SFT at a lower temperature (PPO's honest rival), the best of n SFT answers by the
reward model, DPO where there is runs/dpo, PPO, and the human lines. `gold` is the labeller's score, of which
nothing but the order was trained on; `about` its share of the identifier's words; `kl` is log pi(answer) -
log pi_SFT(answer), averaged over the model's own answers.
"""
import json
import math
from collections import Counter
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import command_line
import common
import corpus
import data
import hardware
import labeller as labeller_file
import masks
import objectives
from errors import UserError, at_least, check_seed
from generate import drawn_from, generate, trained_context
from labeller import Labeller
from tokenizer import Tokenizer


@dataclass
class Config:
    runs: str = "runs"                  # the folder that holds pretrain, sft, rm and ppo
    data: str = ""                      # the data that they were trained on, if it was not the default corpus
    prompts: int = 500                  # held-out functions
    samples: int = 4                    # answers to each, where they are not greedy
    best_of: int = 8                    # samples from which the reward model picks one
    cool: float = 0.5                   # the lower temperature
    max_new: int = 40                   # tokens of an answer at most
    seed: int = 1                       # decides prompts and draws
    device: str = "auto"                # auto, cpu, cuda, mps
    tiny: bool = False                  # evaluate the tiny runs

    TINY = dict(runs="runs/tiny", prompts=30, samples=2, best_of=4, max_new=16)


@dataclass
class Study:
    """What all rows are measured with."""
    tokenizer: Tokenizer
    prompts: list                       # tokens
    human: list                         # the human answers, with their end token
    texts: list                         # the prompts as text
    labeller: Labeller
    reference: torch.nn.Module          # SFT
    reward: torch.nn.Module | None      # the reward model, where there is one
    device: torch.device
    config: Config


def load_study(config: Config) -> tuple[Study, dict[str, torch.nn.Module]]:
    """The models of the stages that have been run, pretraining and SFT at least; the held-out prompts."""
    folder, device = Path(config.runs), hardware.choose_device(config.device)
    models, tokenizers = {}, {}
    for stage in ("pretrain", "sft", "rm", "dpo", "ppo"):
        run_folder = str(folder / stage)
        if stage in ("rm", "dpo", "ppo") and not checkpoint.steps_of(run_folder):
            if stage != "dpo":
                print(f"note: {run_folder} holds no checkpoint, its row is left out; first run: "
                      + checkpoint.command_for(stage, run_folder, config.tiny))
            continue
        tokenizers[stage] = checkpoint.load_tokenizer(run_folder, stage, config.tiny)
        models[stage] = checkpoint.load_model(run_folder).to(device).eval()
    tokenizer = tokenizers["sft"]
    if others := [stage for stage in tokenizers if tokenizers[stage].ranks != tokenizer.ranks]:
        raise UserError(f"{', '.join(others)} in {folder} were trained on other tokens than sft")
    kept = set.union(*(checkpoint.held_out_names(str(folder / stage)) for stage in models))
    context = trained_context(folder / "sft") or math.inf              # an imported model has none
    records = corpus.load_records(config.data, config.tiny)
    train, held_out = corpus.split(records, kept)
    run = common.Run(folder, device, torch.float32)
    pairs = [record for record in held_out if record.response]
    if not labeller_file.can_judge(pairs):
        print(labeller_file.NO_GOLD)
    rows = data.token_rows(run, tokenizer, pairs, ("prompt", "response"), context)
    most = models["sft"].config.max_positions                   # learned ones; 0: as many as it takes
    rows = [row for row in rows if not most or len(row.source) + tokenizer.around + config.max_new <= most]
    if not rows:
        raise UserError(f"{config.data or 'the default corpus'}: the report wants held-out pairs "
                        "(prompt + response)")
    order = np.random.default_rng(config.seed).permutation(len(rows))[:config.prompts]
    prompts, human = zip(*((rows[i].source, rows[i].targets[0]) for i in order))
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    labeller = Labeller(data.texts_of([record for record in train if record.response]))
    return Study(tokenizer, list(prompts), list(human), texts, labeller, models["sft"], models.get("rm"),
                 device, config), models


def answers_of(study: Study, model, temperature: float, prompts: list | None = None) -> list[list[int]]:
    return generate(model, prompts or study.prompts, study.tokenizer, study.config.max_new, temperature,
                    generator=torch.Generator(study.device).manual_seed(study.config.seed))


def first_line(study: Study, answers: list[list[int]]) -> list[list[int]]:
    """What a base model writes is documentation that goes on: its first line is the answer."""
    lines = [study.tokenizer.decode(answer).strip("\n").split("\n")[0] for answer in answers]
    return [tokens + [study.tokenizer.end] for tokens in study.tokenizer.encode_all(lines)]


# ---- measuring ---------------------------------------------------------------------------------------------

@torch.no_grad()
def read(study: Study, model, answers: list[list[int]]) -> Iterator[tuple[data.Batch, torch.Tensor]]:
    """The model's outputs on all (prompt, answer), 64 at a time: the batch, and logits (N, V) of the answer
    tokens or one scalar an answer. Here and below: one answer to every prompt, or several, to all of them and
    to all of them again.
    """
    examples = [data.Example(prompt, [answer]) for prompt, answer in zip(cycle(study.prompts), answers)]
    structure = model.config.structure
    for i in range(0, len(examples), 64):
        batch = data.lay_out(examples[i:i + 64], structure, 128, study.tokenizer).to(study.device)
        where = batch.last if model is study.reward else batch.loss_mask
        yield batch, model(batch, masks.of_batch(structure, batch), where)


def logprobs_of(study: Study, model, answers: list[list[int]], sampled: bool = True, temperature: float = 1.0,
                entropies: list[torch.Tensor] | None = None) -> np.ndarray:
    """log p of every answer, in nats. sampled: in the distribution that generate draws from at that
    temperature; otherwise over the whole vocabulary, as the loss in training. entropies: a list to which the
    entropy at every token is added, where it is wanted.
    """
    sums = []
    for batch, logits_NV in read(study, model, answers):
        if sampled:
            logits_NV = drawn_from(logits_NV, study.tokenizer, temperature)
        logprobs_N = objectives.token_logprobs(logits_NV, batch.targets[batch.loss_mask])
        document_N = batch.document[batch.loss_mask]
        zeros = torch.zeros(int(document_N.max()) + 1, device=study.device)
        sums.append(zeros.index_add(0, document_N, logprobs_N))
        if entropies is not None:
            entropies.append(objectives.entropy(logits_NV))
    return torch.cat(sums).cpu().numpy()


def rewards_of(study: Study, answers: list[list[int]]) -> np.ndarray:
    """The reward model's score of every answer."""
    scores = []
    for batch, scores_N in read(study, study.reward, answers):
        scores.append(data.by_prompt(scores_N, batch)[:, 0])
    return torch.cat(scores).cpu().numpy()


def best_of_n(study: Study) -> list[list[int]]:
    """Of n SFT answers to each prompt, the one that the reward model likes best."""
    n = study.config.best_of
    samples = answers_of(study, study.reference, 1.0, [prompt for prompt in study.prompts for _ in range(n)])
    rewards = np.stack([rewards_of(study, samples[k::n]) for k in range(n)])
    return [samples[i * n + int(rewards[:, i].argmax())] for i in range(len(study.prompts))]


def kl_of_best(n: int) -> float:
    """KL of the best of n samples to the distribution that they are drawn from: log n - (n - 1) / n nats
    (Stiennon et al. 2020, appendix G.3). At most: less where two samples can be equal (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def golds_of(study: Study, answers: list[list[int]]) -> np.ndarray:
    lines = [study.tokenizer.decode(answer) for answer in answers]
    return np.array(study.labeller.golds(cycle(study.texts), lines))


def interval(values: np.ndarray, seed: int, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean (Efron 1979): resample the prompts."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def distinct(lines: list[str], n: int = 2) -> float:
    """Distinct n-grams of words / all n-grams, over all answers together (Li et al. 2016: / all words)."""
    grams = Counter(gram for line in lines for gram in zip(*(line.split()[i:] for i in range(n))))
    return len(grams) / max(1, sum(grams.values()))


def overlap_f1(line: str, human: str) -> float:
    """Token F1 with the human line: the outside view, in which the labeller has no part."""
    ours, theirs = Counter(labeller_file.words_of(line)), Counter(labeller_file.words_of(human))
    common_words = sum((ours & theirs).values())
    return 2 * common_words / max(1, sum(ours.values()) + sum(theirs.values()))


def win_rate(golds: np.ndarray, rivals: np.ndarray) -> float:
    """Share of prompts on which the labeller prefers these answers; a tie is half a win."""
    gaps = golds - rivals
    return float(np.where(abs(gaps) < labeller_file.TIE, 0.5, gaps > 0).mean())


def scores_of(study: Study, answers: list) -> tuple[np.ndarray, dict[str, float]]:
    """The labeller's score of every answer; their mean with its interval over prompts, the mean of `about`,
    and of the overlap with the human lines.
    """
    golds, lines = golds_of(study, answers), [study.tokenizer.decode(answer) for answer in answers]
    low, high = interval(golds.reshape(-1, len(study.prompts)).mean(0), study.config.seed)
    human = [study.tokenizer.decode(answer) for answer in study.human]
    return golds, {
        "gold": golds.mean(), "gold_low": low, "gold_high": high,
        "about": np.mean(list(map(labeller_file.about, cycle(study.texts), lines))),
        "f1": np.mean(list(map(overlap_f1, lines, cycle(human))))}


def distance_of(study: Study, model, answers: list, temperature: float) -> dict[str, float]:
    """How far a model has gone from SFT, in nats per answer drawn at that temperature; its entropy there."""
    entropies: list[torch.Tensor] = []
    logprobs = logprobs_of(study, model, answers, temperature=temperature, entropies=entropies)
    itself = model is study.reference and temperature == 1
    of_sft = logprobs if itself else logprobs_of(study, study.reference, answers)
    return {"entropy": float(torch.cat(entropies).mean()), "kl": float((logprobs - of_sft).mean())}


def loss_of(study: Study, model) -> dict[str, float]:
    """Of the human answers: what a stage has learnt or forgotten."""
    nats = -float(logprobs_of(study, model, study.human, sampled=False).sum())
    n_bytes = sum(len(study.tokenizer.decode(answer).encode()) for answer in study.human)
    return {"loss": nats / sum(map(len, study.human)), "answer_bits_per_byte": nats / math.log(2) / n_bytes}


def row_of(study: Study, answers: list, greedy: list | None, model, rivals: dict[str, np.ndarray],
           temperature: float = 1.0) -> dict:
    """One row of the report. model: the one that drew the answers at that temperature, None where none did:
    best-of-n, human lines, and the base model, whose first lines alone they are. Where there are no greedy
    answers, their figures are those of `answers`.
    """
    golds, sampled = scores_of(study, answers)
    of_greedy = scores_of(study, greedy)[1] if greedy else sampled
    row = {name: sampled[name] for name in ("gold", "gold_low", "gold_high", "about")}
    row |= {"gold_greedy": of_greedy["gold"], "gold_greedy_low": of_greedy["gold_low"],
            "gold_greedy_high": of_greedy["gold_high"]}
    row |= {"about_greedy": of_greedy["about"], "f1_greedy": of_greedy["f1"]}
    if study.reward:
        row["reward"] = rewards_of(study, answers).mean()
    for name in ("human", "sft"):
        row[f"win_{name}"] = win_rate(golds, np.resize(rivals[name], len(golds)))
    row["distinct_2"] = distinct([study.tokenizer.decode(answer) for answer in answers[:len(study.prompts)]])
    row["length"] = np.mean([len(answer) for answer in answers])
    row["ended"] = np.mean([answer[-1] == study.tokenizer.end for answer in answers])
    if model is not None:
        row |= distance_of(study, model, answers, temperature) | loss_of(study, model)
    return {name: float(value) for name, value in row.items()}


# ---- the report --------------------------------------------------------------------------------------------

def last_line(folder: Path, name: str) -> dict:
    """The last line of a run's log that has this figure. {}: none has, as in an imported or a stopped run."""
    rows = reversed(common.read_log(folder / "metrics.jsonl"))
    return next((row for row in rows if name in row), {})


def collect_answers(study: Study, models: dict) -> tuple[dict[str, list], dict[str, list]]:
    """(answers of every row, greedy answers of every model); at temperature 1 where no other is named."""
    asked = [(name, model, temperature) for name, model in models.items() for temperature in (1.0, 0.0)]
    asked.append(("sft_cool", models["sft"], study.config.cool))
    asked += [("best_of_n", None, 1.0)] * bool(study.reward)
    written, greedy = {"human": study.human}, {}
    for name, model, temperature in tqdm(asked, "sampling answers", leave=False, disable=None):
        prompts = study.prompts * (study.config.samples if temperature else 1)
        answers = answers_of(study, model, temperature, prompts) if model else best_of_n(study)
        (written if temperature else greedy)[name] = answers
    return written, greedy


def build_report(config: Config) -> tuple[dict, str]:
    """(report.json's content, the examples as Markdown)."""
    study, models = load_study(config)
    base, sft = models["pretrain"], models["sft"]
    authors = {"base": base, "sft": sft} | {name: models[name] for name in ("dpo", "ppo") if name in models}
    written, greedy = collect_answers(study, authors)
    whole = written["base"]
    written["base"], greedy["base"] = first_line(study, whole), first_line(study, greedy["base"])
    rivals = {name: golds_of(study, written[name]) for name in ("human", "sft")}
    authors["sft_cool"] = sft
    report = {}
    rows = [row for row in ROWS if row in written]
    for name in tqdm(rows, "measuring them", leave=False, disable=None):
        author = None if name == "base" else authors.get(name)
        row = row_of(study, written[name], greedy.get(name), author, rivals,
                     config.cool if name == "sft_cool" else 1.0)
        if name == "base":                                      # not of its first lines: of all that it wrote
            row |= loss_of(study, base) | distance_of(study, base, whole, 1.0)
        report[name] = {column: round(value, 4) for column, value in row.items()}
    if study.reward:
        report["best_of_n"]["kl"] = round(kl_of_best(config.best_of), 4)
    folder = Path(config.runs)
    if of_base := last_line(folder / "pretrain", "bits_per_byte"):
        report["base"]["bits_per_byte"] = round(of_base["bits_per_byte"], 4)
    of_reward_model = last_line(folder / "rm", "accuracy") if study.reward else {}
    report["reward_model"] = {name: round(value, 4) for name, value in of_reward_model.items()
                              if "accuracy" in name}
    report["seconds"] = {stage: line["seconds"] for stage in models
                         if (line := last_line(folder / stage, "seconds"))}
    report["versions"] = {"torch": torch.__version__, "numpy": np.__version__}
    report["processor"] = hardware.processor_name(study.device)
    report["prompts"] = len(study.prompts)
    answers, shown = written | greedy, ("human", "base", "sft", "best_of_n", "dpo", "ppo")
    return report, examples(study, {name: answers[name] for name in shown if name in answers})


def examples(study: Study, answers: dict[str, list]) -> str:
    """Ten prompts with everybody's answer, greedy where it is a model's."""
    blocks = []
    for i in range(min(10, len(study.prompts))):
        lines = [f"{name:<10} {study.labeller.gold(study.texts[i], study.tokenizer.decode(of[i])):.2f}  "
                 f"{study.tokenizer.decode(of[i])}" for name, of in answers.items()]
        blocks.append("```\n" + study.texts[i].rstrip("\n") + "\n\n" + "\n".join(lines) + "\n```")
    return "\n\n".join(blocks)


COLUMNS = ("gold", "gold_low", "gold_high", "gold_greedy", "about", "about_greedy", "f1_greedy", "win_human",
           "win_sft", "reward", "kl", "entropy", "loss", "distinct_2", "length", "ended")
MEANING = {"gold": "labeller's score", "gold_low": "its 95 % interval", "gold_greedy": "of greedy answers¹",
           "about": "identifier's words", "f1_greedy": "with human line¹", "win_human": "preferred to it",
           "reward": "reward model's", "kl": "nats an answer", "entropy": "nats a token",
           "loss": "of human answers", "length": "tokens"}
FOOTNOTE = ("¹ sft_cool, best_of_n and human have none: there the figures of their own answers. Of base the "
            "first lines are scored; kl and entropy are those of all that it wrote.")
ROWS = ("base", "sft", "sft_cool", "best_of_n", "dpo", "ppo", "human")


def _cell(report: dict, row: str, column: str) -> str:
    return f"{report[row][column]:.3f}" if column in report[row] else ""


def as_table(report: dict, columns: tuple = COLUMNS) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(("", *columns)) + " |", "|" + "---|" * (len(columns) + 1)]
    for name in (row for row in ROWS if row in report):
        cells = [_cell(report, name, column) for column in columns]
        lines.append("| " + " | ".join((name, *cells)) + " |")
    return "\n".join(lines)


def as_text(report: dict) -> str:
    """The same for a screen: a line for every figure, a column for every row."""
    rows = [row for row in ROWS if row in report]
    lines = [f"{'':<14}" + "".join(f"{row:>10}" for row in rows)]
    for column in COLUMNS:
        cells = "".join(f"{_cell(report, row, column):>10}" for row in rows)
        lines.append(f"{column:<14}{cells}  {MEANING.get(column, '')}")
    return "\n".join(line.rstrip() for line in lines)


def draw(report: dict, path: Path) -> None:
    """Gold score with its interval, and what was paid for it: KL, entropy, loss."""
    from matplotlib.figure import Figure           # not pyplot: a notebook keeps its own backend
    figure = Figure(figsize=(11, 3.8))
    left, right = figure.subplots(1, 2)
    shown, two_bars = [row for row in ROWS if row in report], ("base", "sft", "dpo", "ppo")
    labels = {"gold": "its answers (of models at temperature 1, sft_cool lower)", "gold_greedy": "greedy"}
    for k, (name, label) in enumerate(labels.items()):
        rows = [row for row in shown if name == "gold" or row in two_bars]
        x = [shown.index(row) + 0.18 * (2 * k - 1) * (row in two_bars) for row in rows]
        y = np.array([report[row][name] for row in rows])
        low, high = (np.array([report[row][f"{name}_{side}"] for row in rows]) for side in ("low", "high"))
        left.bar(x, y, 0.34, label=label, color=("#4477aa", "#ccbb44")[k])
        left.errorbar(x, y, yerr=[y - low, high - y], fmt="none", color="black", capsize=3)
    left.axhline(report["human"]["gold"], color="grey", linestyle=":", linewidth=1)
    left.set(xticks=range(len(shown)), title="gold score (95 % interval over prompts)", ylim=(0, 1.15))
    left.set_xticklabels([row.replace("_", " ") for row in shown])
    left.legend(fontsize=8, loc="upper left")
    measures = ("kl", "entropy", "loss")
    colours = {"sft": "#66ccee", "dpo": "#228833", "ppo": "#aa3377"}
    policies = [row for row in colours if row in report]
    for k, name in enumerate(policies):
        aside = 0.27 * (k - (len(policies) - 1) / 2)
        bars = right.bar(np.arange(3) + aside, [report[name][measure] for measure in measures], 0.25,
                         label=name, color=colours[name])
        right.bar_label(bars, fmt="%.2f", fontsize=7)
    right.set(xticks=range(3), title="what it costs, in nats")
    right.set_xticklabels(("KL to SFT\nper answer", "entropy\nper token", "loss on human\nanswers per token"))
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(config: Config) -> dict:
    common.apply_tiny(config)
    at_least(1, config, "prompts", "samples", "best_of", "max_new")
    check_seed(config)
    if not 0 < config.cool < math.inf:
        raise UserError(f"cool is {config.cool}; it must be above 0 (greedy answers are shown in any case)")
    report, shown = build_report(config)
    folder = Path(config.runs)
    table = as_table(report)
    accuracy = ", ".join(f"{name.replace('_', ' ')} {value:.3f}"
                         for name, value in report["reward_model"].items())
    bits = report["base"].get("bits_per_byte")
    others = "" if bits is None else f"Base model: {bits:.3f} bits per byte of held-out text. "
    others += f"Reward model: {accuracy}." * bool(accuracy)
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in report["seconds"].items())
    text = (f"# What each stage changed\n\n{report['prompts']} held-out functions; {report['processor']}, "
            f"torch {report['versions']['torch']}; {seconds}.\n\n{table}\n\n"
            + "; ".join(f"`{column}`: {meaning}" for column, meaning in MEANING.items())
            + f". {FOOTNOTE}\n\n"
            f"{others}\n\n![report](report.png)\n\n"
            f"## Ten of them, with the labeller's score\n\n{shown}\n")
    draw(report, folder / "report.png")
    last = [name for name in ("sft", "dpo", "ppo") if name in report][-1]
    common.write_atomically(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    common.write_atomically(folder / "report.md", text.encode())
    print(f"{as_text(report)}\n{FOOTNOTE}\n\n{others}\n\n{shown}\n")
    print(f"written: {folder}/report.md, report.json, report.png. "
          f"Next: {common.first_question(f'{folder}/{last}', config.data)}")
    return report


if __name__ == "__main__":
    command_line.run(main, Config, __doc__)

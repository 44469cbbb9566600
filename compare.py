"""Structures and objectives side by side: the same text, the same fine-tuning, nine ways of pretraining.

    python compare.py        trains them all, three seeds each; writes runs/compare/table.md and results.jsonl

Every row reads the same tokens of text in pretraining, at one of two learning rates (which is the better one
depends on structure and objective), then the same pairs in fine-tuning, with loss on the answer alone.
`loss_prefix_lm`: nats per token of the ends of held-out texts, given their beginnings, where that is what the
row has learnt to write; `loss_sft`: per token of held-out human answers. The encoder-decoder has 1.65 times
the parameters of a decoder, and each token passes half of them (Raffel et al. 2020, 3.2.2).
"""
import contextlib
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import command_line
import common
import corpus
import data
import hardware
import labeller
import model as model_file
import train_pretrain
import train_sft
from errors import UserError, at_least
from generate import generate

ROWS = (("causal", "next_token"), ("causal", "prefix_lm"), ("prefix", "prefix_lm"),
        ("prefix", "span_corruption"), ("prefix", "ul2"), ("prefix", "glm_130b"),
        ("encdec", "prefix_lm"), ("encdec", "span_corruption"), ("encdec", "bart"))
RATES = (3e-3, 1e-3)                                # highest learning rates of pretraining
WRITES_ON = ("next_token", "prefix_lm", "ul2")      # objectives that teach to go on with a text
COLUMNS = {"parameters": "parameters", "loss_prefix_lm": "loss, prefix LM",
           "loss_sft": "loss, SFT", "gold": "gold, T = 1", "gold_greedy": "gold, greedy",
           "about_greedy": "about, greedy"}


@dataclass
class Config:
    out: str = "runs/compare"           # folder of the runs, the results and the table
    data: str = ""                      # own data, not the default corpus
    seeds: int = 3                      # runs of every row
    steps: int = 400                    # of pretraining
    sft_steps: int = 400                # of fine-tuning
    sft_lr: float = 3e-3                # its highest learning rate
    prompts: int = 200                  # held-out functions on which the answers are scored
    layers: int = 3                     # layers (encdec: of each stack)
    width: int = 128                    # width of the residual stream
    device: str = "auto"                # auto, cpu, cuda, mps
    tiny: bool = False                  # on a small part of the corpus, in a minute

    TINY = dict(out="runs/tiny/compare", seeds=1, steps=20, sft_steps=20, prompts=10, layers=1, width=32)


# ---- one row, one seed -------------------------------------------------------------------------------------

def measure(config: Config, structure: str, objective: str, lr: float, seed: int) -> dict:
    """Pretrain, fine-tune, and score the answers."""
    folder = Path(config.out) / f"{structure}-{objective}-{lr:g}-{seed}"
    shared = dict(data=config.data, seed=seed, eval_every=0, save_every=0, dtype="fp32", device=config.device,
                  tiny=config.tiny)
    pretrain = train_pretrain.Config(**shared, out=str(folder / "pretrain"), structure=structure,
                                     objective=objective, steps=config.steps, layers=config.layers,
                                     width=config.width, lr=lr)
    sft = train_sft.Config(**shared, init=pretrain.out, out=str(folder / "sft"), steps=config.sft_steps,
                           lr=config.sft_lr, source_weight=0.0)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a") as file, contextlib.redirect_stdout(file):
        first, second = train_pretrain.main(pretrain), train_sft.main(sft)
        row = {"structure": structure, "objective": objective, "lr": lr, "seed": seed,
               "seconds": first["seconds"] + second["seconds"], "loss_sft": second["loss"]}
        if objective in WRITES_ON:
            row["loss_prefix_lm"] = loss_of_ends(pretrain)
        return {**row, **scores_of_answers(config, sft)}


def loss_of_ends(pretrain: train_pretrain.Config) -> float:
    """Nats per token of the ends of held-out texts, given their beginnings."""
    run = common.Run(Path(pretrain.out), hardware.choose_device(pretrain.device), torch.float32)
    pretrain.objective = "prefix_lm"
    loaded = train_pretrain.load_data(pretrain, run)
    model = checkpoint.load_model(pretrain.out).to(run.device)
    return train_pretrain.evaluate(pretrain, run, loaded, model)["loss"]


def scores_of_answers(config: Config, sft: train_sft.Config) -> dict:
    """The labeller's scores of sampled and of greedy answers to the same held-out prompts for all rows."""
    run = common.Run(Path(sft.out), hardware.choose_device(config.device), torch.float32)
    sft.seed, sft.eval_size = 1, config.prompts
    loaded, model = train_sft.load_data(sft, run), checkpoint.load_model(sft.out).to(run.device)
    records = [r for r in corpus.load_records(config.data, config.tiny) if r.response]
    train, _ = corpus.split(records, checkpoint.held_out_names(sft.init))
    judge, decode = labeller.Labeller(data.texts_of(train)), loaded.tokenizer.decode
    prompts = [example.source for example in loaded.held_out]
    scores = {"parameters": model_file.parameter_count(model)}
    for name, temperature in (("gold", 1.0), ("gold_greedy", 0.0)):
        answers = generate(model, prompts, loaded.tokenizer, 40, temperature,
                           generator=torch.Generator(run.device).manual_seed(1))
        scores[name] = float(np.mean(judge.golds(map(decode, prompts), map(decode, answers))))
    about = [labeller.about(decode(p), decode(a)) for p, a in zip(prompts, answers)]
    return {**scores, "about_greedy": float(np.mean(about))}


# ---- all of them -------------------------------------------------------------------------------------------

def one_thread() -> None:
    """A worker's set-up: as many runs at once as there are cores, a thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def table_of(results: list[dict]) -> str:
    """A row per structure, objective and learning rate: mean ± standard deviation over the seeds."""
    lines = ["| " + " | ".join(("structure", "objective", "learning rate", *COLUMNS.values())) + " |",
             "|" + "---|" * (3 + len(COLUMNS))]
    for structure, objective, lr in ((*row, lr) for row in ROWS for lr in RATES):
        rows = [row for row in results
                if (row["structure"], row["objective"], row["lr"]) == (structure, objective, lr)]
        cells = []
        for name in COLUMNS if rows else ():
            values = [row[name] for row in rows if name in row]
            digits = 0 if name == "parameters" else 3
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 and digits else ""
            cells.append(f"{np.mean(values):,.{digits}f}{spread}" if values else "")
        lines.append("| " + " | ".join((structure, objective, f"{lr:g}", *cells)) + " |")
    return "\n".join(lines)


def main(config: Config) -> list[dict]:
    """All rows and seeds; those that results.jsonl holds already are not run again."""
    common.apply_tiny(config)
    at_least(1, config, "seeds", "steps", "sft_steps", "prompts", "layers", "width")
    at_least(0, config, "sft_lr")
    for structure in dict(ROWS):                                       # sizes that no network can have
        model_file.ModelConfig(structure, 512, config.layers, 4, 2, config.width)
    train, _ = corpus.split(corpus.load_records(config.data, config.tiny))
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.jsonl"
    settings = {name: value for name, value in vars(config).items() if name not in ("out", "seeds", "device")}
    made_with = folder / "settings.json"
    if made_with.exists() and json.loads(made_with.read_text()) != settings:
        raise UserError(f"{folder} holds results of other settings ({made_with.read_text()}); another --out?")
    common.write_atomically(made_with, json.dumps(settings).encode())
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["structure"], row["objective"], row["lr"], row["seed"]) for row in results}
    wanted = [(*row, lr, seed) for seed in range(1, config.seeds + 1) for row in ROWS for lr in RATES
              if (*row, lr, seed) not in done]
    vocab = train_pretrain.Config.TINY["vocab"] if config.tiny else train_pretrain.Config.vocab
    data.tokenizer_for(train, vocab)             # once, and not by every worker at the same time
    workers = hardware.cores() if hardware.choose_device(config.device).type == "cpu" else 1
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, one_thread) as pool, open(path, "a") as file:
        jobs = [pool.submit(measure, config, *row) for row in wanted]
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="runs", disable=None):
            results.append(job.result())
            file.write(json.dumps(results[-1]) + "\n")
            file.flush()
    table = table_of(results)
    words = (f"{config.steps} steps of pretraining, {config.sft_steps} of fine-tuning, {config.seeds} seeds; "
             f"{hardware.processor_name(hardware.choose_device(config.device))}, {workers} runs at a time, "
             f"torch {torch.__version__}")
    (folder / "table.md").write_text(f"{table}\n\n{words}\n")
    print(f"{table}\n\n{words}\nwritten: {folder}/table.md, results.jsonl")
    return results


if __name__ == "__main__":
    command_line.run(main, Config, __doc__)

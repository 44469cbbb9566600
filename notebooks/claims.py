"""Claims about the structures and the four stages, each a measurement that anybody can repeat.

    python notebooks/claims.py                        what there is
    python notebooks/claims.py --only hackable        one of them (or several: a,b) over three seeds
    python notebooks/claims.py --all                  all of them; four to five hours on two cores

A measurement trains what it needs (runs/claims/<seed>/..., shared by all, finished runs are not repeated),
measures on held-out functions, and gives rows of figures: a JSON line each in records/claims.jsonl, which the
README and the notebooks read. Two runs at a time on two cores, a thread each. The measurements themselves are
the functions of claims_text.py and claims_rl.py.
"""
import json
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from flow import WORKERS, Flow, read_record

import claims_rl
import claims_text
import command_line
import common
import corpus
import hardware
from errors import UserError, at_least

MEASUREMENTS = claims_text.MEASUREMENTS + claims_rl.MEASUREMENTS
QUALITY = ("gold", "gold_greedy", "win_sft", "about", "about_greedy", "f1_greedy", "kl", "loss", "length")
ACCURACY = ("accuracy", "accuracy_sample_sample", "accuracy_human_sample")
COLUMNS = {                             # of the tables; of measurements that are not named here: all figures
    "rl_against_sft": QUALITY, "relevance": QUALITY,
    "second_round": ("accuracy_on_sft", "accuracy_on_ppo", *QUALITY),
    "reward_model_accuracy": (*ACCURACY, "gold", "gold_greedy", "about_greedy", "kl"),
    "reward_model_data": ACCURACY, "reward_model_boundary": ACCURACY,
    "pretraining_settings": ("bits_per_byte",), "width_transfer": ("bits_per_byte",),
    "stability": ("gold_before", "gold", "reward", "kl", "entropy", "length", "ended", "warned_at")}


@dataclass
class Config:
    only: str = ""                      # names of measurements, separated by commas
    all: bool = False                   # every measurement
    seeds: int = 3                      # runs 1 ... seeds of each
    out: str = "runs/claims"            # folder of the runs
    record: str = "records/claims.jsonl"        # where the rows go; older rows of a measurement are replaced
    data: str = ""                      # own data, not the default corpus
    prompts: int = 1000                 # held-out functions
    best_of: int = 8                    # samples from which the reward model picks one
    tiny: bool = False                  # on a small part of the corpus, with small models

    TINY = dict(seeds=1, out="runs/tiny/claims", record="runs/tiny/claims.jsonl", prompts=20, best_of=4)


def measured(config: Config, name: str, seed: int) -> list[dict]:
    """The rows of one measurement and seed. Runs in a worker: one thread."""
    torch.set_num_threads(1)
    measurement, begun = next(m for m in MEASUREMENTS if m.__name__ == name), time.perf_counter()
    rows = measurement(Flow(config, seed))
    tqdm.write(f"{name}, seed {seed}: {(time.perf_counter() - begun) / 60:.1f} minutes on one core")
    return [{"claim": name, "seed": seed,
             **{key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}}
            for row in rows]


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of the 95 % interval by Student's t; beyond nine seeds a little too wide); nan for one."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}.get(len(values), 2.306)
    spread = np.std(values, ddof=1) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(t * spread / math.sqrt(len(values)))


def table_of(record: list[dict], claim: str) -> str:
    """Mean ± half of the 95 % interval over the seeds, a line per row of the measurement. Runs that diverged
    have no figures; the row tells how many there were.
    """
    rows = [row for row in record if row["claim"] == claim]
    figures = [name for row in rows for name, x in row.items() if isinstance(x, (int, float))]
    columns = COLUMNS.get(claim, tuple(dict.fromkeys(name for name in figures if name != "seed")))
    lines = ["| " + " | ".join(("", *columns)) + " |", "|" + "---|" * (1 + len(columns))]
    for name in dict.fromkeys(row["row"] for row in rows):
        diverged = sum(row["row"] == name and "diverged" in row for row in rows)
        cells = []
        for column in columns:
            values = [row[column] for row in rows if row["row"] == name and row.get(column) is not None]
            mean, half = mean_and_interval(values) if values else (math.nan, math.nan)
            digits = 0 if all(isinstance(value, int) for value in values) else 3
            spread = f" ± {half:.{digits}f}" if len(set(values)) > 1 else ""
            cells.append(f"{mean:,.{digits}f}{spread}" if values else "")
        label = name + f" ({diverged} diverged)" * bool(diverged)
        lines.append("| " + " | ".join((label, *cells)) + " |")
    return "\n".join(lines)


def main(config: Config) -> list[dict]:
    """Measure, and write the rows as they come."""
    common.apply_tiny(config)
    at_least(1, config, "seeds", "prompts", "best_of")
    names = [m.__name__ for m in MEASUREMENTS]
    wanted = list(names) if config.all else list(dict.fromkeys(filter(None, config.only.split(","))))
    if unknown := set(wanted) - set(names):
        raise UserError(f"there is no measurement {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if config.data and "reward_model_boundary" in wanted:
        if not config.all:
            raise UserError("reward_model_boundary compares packages of the default corpus: no --data here")
        wanted.remove("reward_model_boundary")
    if not wanted:
        print("\n".join(f"{m.__name__:<27}{m.__doc__.splitlines()[0]}" for m in MEASUREMENTS))
        return []
    seeds = range(1, config.seeds + 1)
    records = [row for row in read_record(config.record) if row["claim"] in names]
    corpus.load_records(config.data, config.tiny)       # scanned once, and not by every worker at once
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(WORKERS, context)
    try:
        jobs = {pool.submit(measured, config, name, seed): (name, seed) for name in wanted for seed in seeds}
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="measurements", disable=None):
            records = [row for row in records if (row["claim"], row["seed"]) != jobs[job]] + job.result()
            records.sort(key=lambda row: (names.index(row["claim"]), row["seed"]))
            text = "".join(f"{json.dumps(row)}\n" for row in records)
            common.write_atomically(Path(config.record), text.encode())
    finally:                                            # after a mistake or an interruption begin no other
        pool.shutdown(cancel_futures=True)
    for name in wanted:
        print(f"\n## {name}\n\n{table_of(records, name)}")
    if "over_optimisation" in wanted:
        claims_rl.draw_over_optimisation([row for row in records if row["claim"] == "over_optimisation"],
                                         Path(config.record).with_name("over_optimisation.png"))
    machine = hardware.processor_name(torch.device("cpu"))
    print(f"\nwritten: {config.record}. {machine}, torch {torch.__version__}")
    return records


if __name__ == "__main__":
    command_line.run(main, Config, __doc__)

"""Speed, as JSON lines: training steps and generation of a network of any size, on random tokens.

    python bench.py --what train --layers 6 --heads 6 --kv_heads 6 --width 384 --batch_size 16 --dtype bf16
    python bench.py --what generate --batch_size 16 --prompt 64 --new 128
    python bench.py --what train --preset gpt2 --device cuda --compile

A step is forward, loss, backward, clipping, AdamW. Medians and deciles are over the repetitions;
`foreign_cpu` is the share of the cores that other processes held meanwhile: above 0.1, measure again.
"""
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Callable

import torch

import command_line
import common
import data
import hardware
import masks
import model as model_file
import objectives
from errors import UserError, at_least
from generate import generate
from tokenizer import SPECIALS, Tokenizer


@dataclass
class Config:
    what: str = "train"                 # train or generate
    preset: str = ""                    # a published family (presets.py), in its own sizes
    structure: str = "causal"           # causal, prefix or encdec
    layers: int = 6                     # layers (encdec: of each stack)
    heads: int = 6                      # attention heads
    kv_heads: int = 2                   # key/value heads that they share
    width: int = 384                    # width of the residual stream
    vocab: int = 512                    # tokens
    context: int = 256                  # train: tokens of a row
    source: int = 0                     # train: how many of them are the source
    batch_size: int = 16                # rows; generate: prompts
    prompt: int = 64                    # generate: tokens of a prompt
    new: int = 128                      # generate: tokens of an answer
    repetitions: int = 15               # timed, after 3 that are not
    device: str = "auto"                # auto, cpu, cuda, mps
    dtype: str = "fp32"                 # fp32 or bf16 (autocast)
    compile: bool = False               # torch.compile the model


def train_step(config: Config, model, run: common.Run, tokenizer: Tokenizer) -> Callable[[], None]:
    """One step on full rows, all of whose targets are counted."""
    wrapped = common.wrap(model, run, config.compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(256, (config.batch_size, config.context - 1)).tolist()
    examples = [data.Example(row[:config.source], [row[config.source:]]) for row in tokens]
    structure = model.config.structure
    batch = data.lay_out(examples, structure, 1, tokenizer).to(run.device)            # one to a row

    def step() -> None:
        with run.autocast():
            logits_NV = wrapped(batch, masks.of_batch(structure, batch), batch.loss_mask)
            loss = objectives.language_model_loss(logits_NV, batch.targets[batch.loss_mask])
        (loss / batch.loss_mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def generation(config: Config, model, run: common.Run, tokenizer: Tokenizer) -> Callable[[], None]:
    """Every prompt continued by exactly `new` tokens: no end is honoured."""
    prompts = torch.randint(256, (config.batch_size, config.prompt)).tolist()
    tokenizer.end = -1

    def step() -> None:
        with run.autocast(sampling=True):
            generate(model, prompts, tokenizer, config.new)
    return step


def busy_seconds() -> float | None:
    """CPU seconds that all other processes have used (Linux)."""
    try:
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        with open("/proc/stat") as file:
            rows = [line.split()[1:9] for line in file if line.split()[0] in mine]
    except (AttributeError, OSError):
        return None
    ticks = [sum(map(int, column)) for column in zip(*rows)]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK") - time.process_time()


def peak_mb() -> int | None:
    """The most memory that this process has held, in MiB; Windows does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))          # in bytes there, in KiB here


def main(config: Config) -> dict:
    """Time it and print one line."""
    if config.what not in ("train", "generate"):
        raise UserError(f"what is {config.what!r}; it must be train or generate")
    at_least(1, config, "batch_size", "new")
    at_least(0, config, "source", "prompt")
    if config.repetitions < 2 or config.source >= config.context - 1 or config.vocab < 256 + len(SPECIALS):
        raise UserError("wanted are 2 repetitions, a context longer than its source, and a vocab of at least "
                        f"{256 + len(SPECIALS)}")
    device = hardware.choose_device(config.device)
    run = common.Run(None, device, hardware.choose_dtype(config.dtype, device)[0])
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {b"%06d" % i: 256 + i for i in range(config.vocab - 256 - len(SPECIALS))}
    tokenizer = Tokenizer(ranks)
    model = model_file.build(
        model_file.preset(config.preset) if config.preset else
        model_file.ModelConfig(config.structure, tokenizer.vocab, config.layers, config.heads,
                               config.kv_heads, config.width)).to(device)
    if config.what == "train" and 0 < model.config.max_positions < config.context:
        raise UserError(f"{config.preset} has {model.config.max_positions} positions; context is "
                        f"{config.context}")
    step = (train_step if config.what == "train" else generation)(config, model, run, tokenizer)
    for _ in range(3):
        step()
    seconds, before, start = [], busy_seconds(), time.perf_counter()
    for _ in range(config.repetitions):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    foreign = None if before is None else (busy_seconds() - before) / (time.perf_counter() - start)
    tokens = config.batch_size * (config.context if config.what == "train" else config.new)
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    record = {"impl": "ours", "variant": f"{config.what} {config.preset or model.config.structure}",
              "tokens_per_s": round(tokens / statistics.median(seconds), 1),
              "ms_median": round(1e3 * statistics.median(seconds), 2), "ms_p10": round(1e3 * deciles[0], 2),
              "ms_p90": round(1e3 * deciles[-1], 2), "params": model_file.parameter_count(model),
              "rss_peak_mb": peak_mb(),
              "foreign_cpu": foreign and round(max(0.0, foreign) / hardware.cores(), 3),
              "dtype": run.dtype_name(sampling=config.what == "generate"),
              "threads": torch.get_num_threads(),
              "processor": hardware.processor_name(device), "torch": torch.__version__}
    if device.type == "cuda":
        record["cuda_peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    print(json.dumps(record))
    return record


if __name__ == "__main__":
    command_line.run(main, Config, __doc__)

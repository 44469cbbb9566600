"""What is the same in every stage and teaches nothing about it: flags, seed, device, ranks, schedule, log."""
import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import os
import platform
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm


class UserError(ValueError):
    """A mistake that the user can mend. One sentence on stderr, exit code 2, nothing written."""


class Fault(Exception):
    """Something broke on the way. One sentence on stderr, exit code 1, the last checkpoint is kept."""


# ---- command line: the dataclass is the flags --------------------------------------------------------------

class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def parse(config_class, argv: list[str], description: str):
    """--field value for every field; the comment behind a field is its help. Unknown flags are refused."""
    comments = dict(re.findall(r"^    (\w+):.*?#\s*(.+)$", inspect.getsource(config_class), re.MULTILINE))
    parser = _Parser(prog=Path(sys.argv[0]).name, description=description, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(config_class):
        help_text = f"{comments.get(field.name, '')} ({field.default!r})".replace("%", "%%")
        if field.type is bool:
            parser.add_argument(f"--{field.name}", action="store_true", default=field.default, help=help_text)
        else:
            parser.add_argument(f"--{field.name}", type=field.type, default=field.default, help=help_text,
                                metavar="")
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        flags = [f"--{field.name}" for field in dataclasses.fields(config_class)]
        near = difflib.get_close_matches(flag, flags, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists all flags"
        raise UserError(f"unknown flag {flag}; {hint}")
    return config_class(**vars(known))


def run_main(main, config_class, description: str) -> None:
    """The program around main(config): flags in, exit code out. No traceback for a user's mistake."""
    def stop(signum, frame):
        raise SystemExit(_say("stopped; the same command goes on from the last checkpoint", 128 + signum))
    signal.signal(signal.SIGTERM, stop)
    try:
        main(parse(config_class, sys.argv[1:], description))
    except UserError as error:
        sys.exit(_say(error, 2))
    except Fault as error:
        sys.exit(_say(error, 1))
    except BrokenPipeError:                  # whoever read our output has seen enough
        sys.stdout = open(os.devnull, "w")
    except KeyboardInterrupt:
        sys.exit(_say("interrupted; the same command goes on from the last checkpoint", 128 + signal.SIGINT))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _say(message, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


# ---- the run: where and on what it computes ----------------------------------------------------------------

@dataclasses.dataclass
class Run:
    """Device, number format, ranks and folder of one training run."""
    folder: Path
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    seconds_before: float = 0.0          # of an interrupted run that this one goes on with
    started: float = dataclasses.field(default_factory=time.time)

    def print(self, *words) -> None:
        if self.rank == 0:
            tqdm.write(" ".join(str(word) for word in words))

    def seconds(self) -> float:
        return self.seconds_before + time.time() - self.started

    def autocast(self):
        """Products in bf16 where that is faster; weights, norms and losses stay fp32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if enabled else contextlib.nullcontext()

    def sum(self, value) -> Tensor:
        """The sum over all ranks, fp64."""
        total = torch.as_tensor(value, dtype=torch.float64, device=self.device).clone()
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def mine(self, items: list) -> list:
        """This rank's share of a step's sequences."""
        return items[self.rank::self.world]

    def gather(self, mine: dict) -> dict:
        """The ranks' dictionaries, joined."""
        if self.world == 1:
            return mine
        parts: list = [None] * self.world
        dist.all_gather_object(parts, mine)
        return {key: value for part in parts for key, value in part.items()}

    def micro_batches(self, items: list, size: int) -> list[list]:
        """This rank's share in micro-batches of at most `size` (0: all at once); equally many on every
        rank.
        """
        n = math.ceil(len(items) / (self.world * size)) if size else 1
        parts = [self.mine(items)[i::n] for i in range(n)]
        if not all(parts):
            raise UserError(f"a step has {len(items)} sequences for {self.world} ranks x {n} micro-batches; "
                            "raise batch_size or use fewer ranks")
        return parts

    def finished_before(self) -> dict[str, float]:
        """Nothing is left to do. Returns the last line of the log."""
        self.print(f"{self.folder} is finished already; --overwrite trains it anew, more --steps go on")
        return json.loads((self.folder / "metrics.jsonl").read_text().splitlines()[-1])

    def finish(self, following: str, tiny: bool) -> None:
        """The last words of a stage."""
        self.print(f"done in {self.seconds():.0f} s: {self.folder}\nnext: {following}{' --tiny' * tiny}")

    def progress(self, items, description: str):
        return tqdm(items, desc=description, leave=False, disable=True if self.rank else None)

    def print_example(self, text: str) -> None:
        indented = text.replace("\n", "\n  ")
        self.print(f"One example; [[ ]] marks the tokens whose prediction is counted:\n  {indented}")

    def write_samples(self, rows: list[tuple[str, str, str]]) -> None:
        """samples.txt: prompt, what a human wrote, what the model wrote; two of them on the screen."""
        if self.rank == 0:
            texts = [f"--- prompt\n{prompt}\n--- human\n{human}\n--- model\n{model}\n"
                     for prompt, human, model in rows]
            (self.folder / "samples.txt").write_text("\n".join(texts), encoding="utf-8")
            self.print("\n".join(texts[:2]))


def set_up(config) -> Run:
    """Check the settings that all stages share, join the other ranks, choose device, threads and number
    format.
    """
    apply_tiny(config)
    check(config)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % world:
        raise UserError(f"batch_size {config.batch_size} must be a multiple of the {world} ranks")
    device = choose_device(config.device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    run = Run(Path(config.out), device, torch.float32, rank, world)
    threads = choose_threads(device, world)
    run.dtype, why = choose_dtype(config.dtype, device)
    torch.manual_seed(config.seed)                  # after the timing above, which draws numbers of its own
    run.print(f"{processor_name(device)}, torch {torch.__version__}, {world} rank(s) x {threads} thread(s), "
              f"{why}")
    return run


def apply_tiny(config) -> None:
    """--tiny: every field that was left at its default takes its value from Config.TINY."""
    if config.tiny:
        for field in dataclasses.fields(config):
            if field.name in config.TINY and getattr(config, field.name) == field.default:
                setattr(config, field.name, config.TINY[field.name])


def check(config) -> None:
    for name in ("steps", "batch_size", "context"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least 1")
    for name in ("micro_batch_size", "warmup", "weight_decay", "lr", "clip", "eval_every", "save_every"):
        if getattr(config, name) < 0:
            raise UserError(f"{name} is {getattr(config, name)}; it must not be negative")
    if config.keep < 1:
        raise UserError(f"keep is {config.keep}; at least 1 checkpoint must be kept")
    if config.resume not in ("auto", "must", "never"):
        raise UserError(f"resume is {config.resume!r}; it must be auto, must or never")


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown; try auto, cpu, cuda or mps") from None
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device.type, False):
        raise UserError(f"device {name!r} is not present on this machine; --device auto takes what is there")
    return device


def training_product(dtype: torch.dtype, device) -> float:
    """Seconds of a small layer's products and attention, forward and backward; the best of several.

    Attention belongs in it: on some processors bf16 halves the time of a product and doubles that of
    attention.
    """
    x = torch.randn(1024, 128, device=device)
    w_in = torch.randn(512, 128, device=device, requires_grad=True)
    w_out = torch.randn(128, 512, device=device, requires_grad=True)
    kind, lower = torch.device(device).type, dtype != torch.float32
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        with torch.autocast(kind, dtype) if lower else contextlib.nullcontext():
            h = F.linear(F.silu(F.linear(x, w_in)), w_out)
            heads = h.view(4, 256, 4, 32).transpose(1, 2)
            attended = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        attended.float().square().mean().backward()
        if kind == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def choose_threads(device, world: int) -> int:
    """As many threads as this rank has cores, unless one is measured to be as fast: some hosts share their
    cores.
    """
    n = max(1, (os.cpu_count() or 1) // world)
    if "OMP_NUM_THREADS" in os.environ and world == 1:
        return torch.get_num_threads()
    if device.type == "cpu" and n > 1:
        seconds = {}
        for threads in (1, n):
            torch.set_num_threads(threads)
            seconds[threads] = training_product(torch.float32, device)
        n = 1 if seconds[1] < 0.95 * seconds[n] else n
    torch.set_num_threads(n)
    return n


def choose_dtype(name: str, device) -> tuple[torch.dtype, str]:
    """bf16 where it is measured to be faster. Returns the dtype and the reason, in words."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if name in names:
        return names[name], f"{name} as asked"
    if name != "auto":
        raise UserError(f"dtype {name!r} is unknown; try auto, fp32 or bf16")
    if device.type == "mps":
        return torch.float32, "fp32 (the safe choice on mps)"
    fp32, bf16 = training_product(torch.float32, device), training_product(torch.bfloat16, device)
    reason = f"a layer takes {fp32 * 1e3:.2f} ms in fp32, {bf16 * 1e3:.2f} ms in bf16"
    return (torch.bfloat16, f"bf16 ({reason})") if bf16 < 0.95 * fp32 else (torch.float32, f"fp32 ({reason})")


def processor_name(device) -> str:
    """The processor's own name, for records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        match = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if match:
            return f"{match.group(1)} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor() or platform.machine()


def learning_rate(step: int, config) -> float:
    """1) warm up linearly over `warmup` steps; 2) then follow a cosine; 3) down to a tenth of lr at the last
    step.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def open_run(run: Run, config, tokenizer, held_out_names) -> None:
    """Make the run folder: config.json, the tokenizer, and the names that no training set may hold."""
    if run.rank:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    if config.overwrite:                        # only now: whatever was wrong with the settings has been said
        for old in run.folder.glob("checkpoint-*.pt"):
            old.unlink()
    content = {**dataclasses.asdict(config), "ranks": run.world, "dtype_used": str(run.dtype),
               "torch": torch.__version__, "processor": processor_name(run.device)}
    (run.folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")
    tokenizer.save(run.folder / "tokenizer.tiktoken")
    (run.folder / "held_out.json").write_text(json.dumps(sorted(held_out_names), indent=0) + "\n")


def wrap(model, run: Run, compiled: bool):
    """The model as the training step calls it: compiled if asked for, and averaging gradients where there are
    ranks.
    """
    wrapped = torch.compile(model) if compiled else model
    if run.world == 1:
        return wrapped
    device_ids = [run.device.index] if run.device.type == "cuda" else None
    return DistributedDataParallel(wrapped, device_ids=device_ids)


def unwrap(model):
    """The model itself, whatever DDP and torch.compile have put around it."""
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model


def gradients_meet(wrapped, last: bool):
    """Ranks exchange gradients in the backward pass of a step's last micro-batch only."""
    return contextlib.nullcontext() if last or not hasattr(wrapped, "no_sync") else wrapped.no_sync()


def check_finite(step: int, **values) -> None:
    """Stop before the optimizer would spoil the weights."""
    for name, value in values.items():
        if not math.isfinite(float(torch.as_tensor(value).detach())):
            raise Fault(f"the {name} of step {step + 1} is not a finite number; the last checkpoint is kept. "
                        "A lower lr, more warmup or fp32 may help")


def padding_share(batches) -> float:
    """Padding tokens / all computed tokens."""
    padding, everything = zip(*(batch.padding() for batch in batches))
    return sum(padding) / sum(everything)


def due(done: int, every: int, steps: int) -> bool:
    return done == steps or bool(every) and done % every == 0


# ---- log ---------------------------------------------------------------------------------------------------

class Log:
    """One line per interval on the screen, the same in metrics.jsonl, and the curves of all columns in
    curves.png.
    """

    def __init__(self, run: Run, start: int):
        self.run, self.path, self.header = run, run.folder / "metrics.jsonl", None
        self.interval: dict[str, list[float]] = {}
        if run.rank == 0:                      # resumed: forget what came after the checkpoint
            kept = [line for line in self._lines() if json.loads(line)["step"] <= start] if start else []
            self.path.write_text("".join(f"{line}\n" for line in kept))
            run.seconds_before = json.loads(kept[-1])["seconds"] if kept else 0.0
        self.last = json.loads(self._lines()[-1]) if start and self._lines() else {}

    def add(self, metrics: dict[str, float]) -> None:
        """Remember one step's figures: a line shows their mean over its interval."""
        for name, value in metrics.items():
            self.interval.setdefault(name, []).append(float(value))

    def _lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def line(self, step: int, **metrics: float) -> None:
        means = {name: sum(values) / len(values) for name, values in self.interval.items()}
        self.interval = {}
        self.last = row = {"step": step, **means, **metrics, "seconds": round(self.run.seconds(), 1)}
        if self.run.rank:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if self.header != list(row):
            self.header = list(row)
            self.run.print(" ".join(f"{name:>{max(9, len(name))}}" for name in row))
        self.run.print(" ".join(f"{_short(value):>{max(9, len(name))}}" for name, value in row.items()))

    def curves(self) -> None:
        """Draw every column against the step."""
        rows = [json.loads(line) for line in self._lines()] if self.run.rank == 0 else []
        names = list(dict.fromkeys(name for row in rows for name in row if name not in ("step", "seconds")))
        if not names:
            return
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        n_columns = min(3, len(names))
        n_rows = math.ceil(len(names) / n_columns)
        figure, axes = plt.subplots(n_rows, n_columns, figsize=(4 * n_columns, 2.6 * n_rows), squeeze=False)
        for axis, name in zip(axes.flat, names):
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points), marker=".", markersize=3, linewidth=1)
            axis.set_title(name.replace("_", " "), fontsize=10)
            axis.grid(alpha=0.3)
        for axis in axes.flat[len(names):]:
            axis.axis("off")
        for axis in axes[-1]:
            axis.set_xlabel("step")
        figure.tight_layout()
        figure.savefig(self.run.folder / "curves.png", dpi=110)
        plt.close(figure)


def _short(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e7 else f"{value:.4g}"

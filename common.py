"""What is the same in every stage and teaches nothing about it: seed, ranks, schedule, run folder, log."""
import contextlib
import dataclasses
import inspect
import json
import math
import os
import shlex
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import hardware
from errors import Fault, UserError, at_least, check_seed


CACHE = Path("runs/cache")        # scanned corpus, labeller's words, trained tokenizers, by content


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

    def print(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def dtype_name(self, sampling: bool = False) -> str:
        return "bf16" if self.in_bf16(sampling) else "fp32"

    def in_bf16(self, sampling: bool = False) -> bool:
        """Whether products are taken in bf16. Sampling on a CPU never takes them so: the cache has another
        length at every token, and model.few_sizes says what that costs.
        """
        return self.dtype != torch.float32 and not (sampling and self.device.type == "cpu")

    def seconds(self) -> float:
        return self.seconds_before + time.time() - self.started

    def autocast(self, sampling: bool = False):
        """Products in bf16 where that is faster; weights, norms and losses stay fp32."""
        lower = self.in_bf16(sampling)
        return torch.autocast(self.device.type, self.dtype) if lower else contextlib.nullcontext()

    def sum(self, value) -> Tensor:
        """The sum over all ranks, fp64 where the device has it."""
        total = torch.as_tensor(value, dtype=hardware.widest(self.device), device=self.device).clone()
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def mine(self, items: list) -> list:
        """This rank's share of a step's sequences."""
        return items[self.rank::self.world]

    def batches(self, items: list, size: int) -> list[list]:
        """This rank's share of what is only read, in batches of `size` (0: 64, all ranks together)."""
        mine, size = self.mine(items), size or math.ceil(64 / self.world)
        return [mine[i:i + size] for i in range(0, len(mine), size)]

    def gather(self, mine) -> list:
        """What each rank has, rank by rank."""
        everybodys = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(everybodys, mine)
        return everybodys

    def agreed(self, value):
        """Rank 0's value, on every rank: what was measured may differ between them."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def micro_batches(self, items: list, size: int) -> list[list]:
        """This rank's share in micro-batches of about `size` (0: all at once); equally many on every rank,
        none of them empty.
        """
        n = math.ceil(len(items) / (self.world * size)) if size else 1
        n = max(1, min(n, len(items) // self.world))
        parts = [self.mine(items)[i::n] for i in range(n)]
        if not all(parts):
            raise UserError(f"a step has {len(items)} sequences for {self.world} ranks x {n} micro-batches; "
                            "raise batch_size or use fewer ranks")
        return parts

    def finished_before(self, state: dict | None, steps: int) -> dict[str, float] | None:
        """The last line of the log, where nothing is left to do: the checkpoint is the run's last, that line
        was written after it, and samples after that.
        """
        rows = read_log(self.folder / "metrics.jsonl") if state and state["step"] >= steps else []
        if not rows or rows[-1]["step"] < state["step"] or not (self.folder / "samples.txt").exists():
            return None
        self.print(f"{self.folder} is finished already; --overwrite trains it anew, more --steps go on")
        return rows[-1]

    def finish(self, following: str) -> None:
        """The last words of a stage."""
        self.print(f"done in {self.seconds():.0f} s: {self.folder}\nnext: {following}")

    def progress(self, items, description: str):
        return tqdm(items, desc=description, leave=False, disable=True if self.rank else None)

    def print_example(self, text: str) -> None:
        indented = text.replace("\n", "\n  ")
        self.print(f"One example; between [[ and ]] the target, or what is scored:\n  {indented}")

    def write_samples(self, rows: list[tuple[str, str, str]], titles: tuple = ("human", "model")) -> None:
        """samples.txt: prompt, what a human wrote (if anything), what the model wrote, or two texts of other
        titles; two of the rows on the screen.
        """
        if self.rank == 0:
            texts = ["".join(f"--- {title}\n{text}\n" for title, text in zip(("prompt", *titles), row)
                             if text or title == "model") for row in rows]
            (self.folder / "samples.txt").write_text("\n".join(texts), encoding="utf-8")
            self.print("\n".join(texts[:2]))


def passed_on(config, flag: str, *kept: str) -> str:
    """The flags of the next command: by `flag` this run's folder and by their names the fields `kept`, where
    they are not the usual ones; and --tiny.
    """
    return flags_of(config, {flag: "out", **{f"--{name}": name for name in kept}})


def flags_of(config, fields: dict[str, str]) -> str:
    """The flags of those of these fields, {flag: name}, that are not the usual ones."""
    usual = vars(type(config)()) | (config.TINY if config.tiny else {})
    given = {flag: value for flag, name in fields.items() if (value := getattr(config, name)) != usual[name]}
    return "".join(f" {flag}" + f" {shlex.quote(str(value))}" * (value is not True)
                   for flag, value in given.items()) + " --tiny" * config.tiny


def command_of(config) -> str:
    """The command that began a run and goes on with it, without its folder, which may be moved."""
    others = ("out", "resume", "overwrite", "tiny")
    fields = {f"--{name}": name for name in vars(config) if name not in others}
    return f"python {Path(inspect.getfile(type(config))).name}" + flags_of(config, fields)


def first_question(folder: str, data: str) -> str:
    """The command that asks a finished run a first question, which is left open for own data."""
    prompt = "..." if data else "def area(width, height):"
    return f'python generate.py --run {shlex.quote(folder)} --prompt "{prompt}"'


def read_log(path: Path) -> list[dict]:
    """The rows of a log, none where there is no file. A last line that was cut short, where the disk was full
    or the power went, is left out.
    """
    try:
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from None


def set_up(config) -> Run:
    """Check the settings that all stages share, join the other ranks, choose device, threads and number
    format.
    """
    apply_tiny(config)
    check(config)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % world:
        raise UserError(f"batch_size {config.batch_size} must be a multiple of the {world} ranks")
    device = hardware.choose_device(config.device)
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"]) if world > 1 else device.index or 0
        device = hardware.choose_device(f"cuda:{local}")
    if world > 1 and not dist.is_initialized():
        own = device if device.type == "cuda" else None
        dist.init_process_group("nccl" if own else "gloo", device_id=own)
    run = Run(Path(config.out), device, torch.float32, rank, world)
    before = hardware.recorded(config)
    threads = min(run.gather(hardware.choose_threads(device, world, before.get("threads", 0))))
    torch.set_num_threads(threads)                  # what was measured may differ between the ranks
    run.dtype, why = run.agreed(hardware.choose_dtype(config.dtype, device, before.get("dtype_used", "")))
    torch.manual_seed(config.seed)                  # after the timing above, which draws numbers of its own
    run.print(f"{hardware.processor_name(device)}, torch {torch.__version__}, {world} rank(s) x {threads} "
              f"thread(s), {why}")
    return run


def apply_tiny(config) -> None:
    """--tiny: every field that was left at its default takes its value from Config.TINY."""
    if config.tiny:
        for field in dataclasses.fields(config):
            if field.name in config.TINY and getattr(config, field.name) == field.default:
                setattr(config, field.name, config.TINY[field.name])


def check(config) -> None:
    at_least(1, config, "steps", "batch_size", "context", "row", "epochs", "minibatch_size", "ptx_size",
             "max_new", "eval_size", "prompts", "keep")
    check_seed(config)
    at_least(0, config, "micro_batch_size", "warmup", "weight_decay", "lr", "clip", "eval_every",
             "log_every", "save_every", "source_weight", "beta", "kl_target", "kl_stop", "value_lr",
             "adam_eps", "ptx", "no_end", "score_clip", "mismatched")
    check_out(config.out)
    if not 2 <= getattr(config, "answers", 2) <= 9:
        raise UserError(f"answers is {config.answers}; it must be 2 to 9")
    if not 0 <= getattr(config, "label_noise", 0) <= 0.5:
        raise UserError(f"label_noise is {config.label_noise}; it must be 0 to 0.5, where no order is left")
    if getattr(config, "max_new", 0) >= config.context:
        raise UserError(f"max_new {config.max_new} leaves no room for a prompt in context {config.context}")
    for name in ("gamma", "lam"):
        if not 0 <= getattr(config, name, 1) <= 1:
            raise UserError(f"{name} is {getattr(config, name)}; it must lie between 0 and 1")
    for name in ("temperature", "ratio_clip", "value_clip"):
        if not 0 < getattr(config, name, 1) < math.inf:
            raise UserError(f"{name} is {getattr(config, name)}; it must be above 0 and finite")
    if config.resume not in ("auto", "must", "never"):
        raise UserError(f"resume is {config.resume!r}; it must be auto, must or never")


def check_out(out: str) -> None:
    """Refuse a run folder that cannot be made or written to; nothing is made yet."""
    if not out:
        raise UserError("out is empty; it must name a folder")
    folder = Path(out).absolute()
    try:
        place = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:                                        # a name that is too long
        raise UserError(f"out {out}: {error.strerror}") from None
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"out {out}: {place} is no folder that can be written to")


def learning_rate(step: int, config, highest: float | None = None) -> float:
    """1) warm up linearly over `warmup` steps; 2) then follow a cosine; 3) down towards a tenth of the
    highest rate, which is config.lr where no other is given.
    """
    highest = config.lr if highest is None else highest
    if step < config.warmup:
        return highest * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return highest * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


@contextlib.contextmanager
def replacing(path: Path):
    """A binary file to write, which takes the place of `path` when it is complete and on the disk: an
    interrupted program leaves the old file or the new one, never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def speaks() -> bool:
    """Whether this process is the one that speaks for all ranks, also before they have joined."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def rank_zero_first():
    """What rank 0 computes and caches, the other ranks only read."""
    waits = dist.is_initialized() and dist.get_rank() > 0
    if waits:
        dist.barrier()
    try:
        yield
    finally:                                    # after a mistake too: the others then find it themselves
        if dist.is_initialized() and not waits:
            dist.barrier()


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
        if not math.isfinite(value):
            raise Fault(f"the {name} of step {step + 1} is not a finite number; the last checkpoint, if "
                        "there is one, is kept. A lower lr, more warmup or fp32 may help")


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
        self.run, self.path = run, run.folder / "metrics.jsonl"
        self.header: list[str] = []
        self.interval: dict[str, list[float]] = {}
        # resumed: forget what came after the checkpoint
        rows = [row for row in read_log(self.path) if row["step"] <= start] if start else []
        if run.rank == 0:
            write_atomically(self.path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
        self.first, self.last = (rows[0], rows[-1]) if rows else ({}, {})
        run.seconds_before = self.last.get("seconds", 0.0)

    def add(self, metrics: dict[str, float]) -> None:
        """Remember one step's figures: a line shows their mean over its interval, or over what a resumed run
        has done of it.
        """
        for name, value in metrics.items():
            self.interval.setdefault(name, []).append(float(value))

    def lacks(self, step: int, config) -> bool:
        """Whether a line is due after this step that is not there."""
        every = (config.eval_every, getattr(config, "log_every", 1))
        return step > self.last.get("step", 0) and any(due(step, n, config.steps) for n in every)

    def line(self, step: int, **metrics: float) -> None:
        check_finite(step - 1, **{name: value for name, value in metrics.items() if "loss" in name})
        means = {name: sum(values) / len(values) for name, values in self.interval.items()}
        self.interval = {}
        self.last = row = {"step": step, **means, **metrics, "seconds": round(self.run.seconds(), 1)}
        self.first = self.first or row
        if self.run.rank:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if new := [name for name in row if name not in self.header]:
            self.header += new
            self.run.print(" ".join(f"{name:>{max(9, len(name))}}" for name in self.header))
        self.run.print(" ".join(f"{_short(row.get(name)):>{max(9, len(name))}}" for name in self.header))

    def curves(self) -> None:
        """Draw every column against the step."""
        rows = read_log(self.path) if self.run.rank == 0 else []
        names = list(dict.fromkeys(name for row in rows for name in row if name not in ("step", "seconds")))
        if not names:
            return
        from matplotlib.figure import Figure       # not pyplot: a notebook keeps its own backend
        n_columns = min(3, len(names))
        n_rows = math.ceil(len(names) / n_columns)
        figure = Figure(figsize=(4 * n_columns, 2.6 * n_rows))
        axes = figure.subplots(n_rows, n_columns, squeeze=False)
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


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e7 else f"{value:.4g}"

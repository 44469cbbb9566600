"""What this machine does best: the device that is present; format, threads, ranks by timing a small layer.

Names of processors tell nothing: on one CPU bf16 halves the time of a step, on another it takes ten times as
long; on one host two threads are twice as fast as one, on the next two processes are and two threads are not.
"""
import contextlib
import functools
import math
import os
import platform
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import masks
from errors import UserError, at_least, read_json
from model import attention

# a CPU's kernels for bf16 (oneDNN) are made for one size each, and the last 1,024 kept: packed rows need more
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")


def choose_device(name: str) -> torch.device:
    """auto: cuda, mps or cpu, the first that is present."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown; try auto, cpu, cuda or mps") from None
    here = torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    present = {"cpu": True, "cuda": here, "mps": torch.backends.mps.is_available()}
    if not present.get(device.type, False):
        raise UserError(f"device {name!r} is not present on this machine; --device auto takes what is there")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)            # what waits for "the" GPU then waits for this one
    return device


def seconds_of_a_layer(dtype: torch.dtype, device, threads: int = 0) -> float:
    """Seconds of a small layer's products and attention, forward and backward: the best of 12, or of 3 to 11
    where they take long. Both, as bf16 may speed up the one and slow down the other. threads 0: as many as
    are set.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    kind, lower = torch.device(device).type, dtype != torch.float32
    width = 128 if kind == "cpu" else 2048       # of less a GPU would say how fast its kernels are launched
    x = torch.randn(1024, width, device=device)
    w_in = torch.randn(4 * width, width, device=device, requires_grad=True)
    w_out = torch.randn(width, 4 * width, device=device, requires_grad=True)
    seconds = []
    while len(seconds) < 3 or len(seconds) < 12 and sum(seconds) < 0.5:
        start = time.perf_counter()
        with torch.autocast(kind, dtype) if lower else contextlib.nullcontext():
            h = F.linear(F.silu(F.linear(x, w_in)), w_out)
            heads = h.view(4, 256, width // 32, 32).transpose(1, 2)
            attended = attention(heads, heads, heads, masks.causal)
        attended.float().square().mean().backward()
        if kind == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return min(seconds)


@functools.cache
def seconds_in_turns(device, *ways: tuple[torch.dtype, int]) -> list[float]:
    """Seconds of a layer in these ways (dtype, threads): the best of three turns, since another program may
    hold a core for a while. One turn, where a way takes three times as long as another. Measured once.
    """
    rounds: list[list[float]] = []
    while len(rounds) < 3 and not (rounds and max(rounds[0]) > 3 * min(rounds[0])):
        rounds.append([seconds_of_a_layer(dtype, device, threads) for dtype, threads in ways])
    return [min(times) for times in zip(*rounds)]


def widest(device) -> torch.dtype:
    """fp64; on mps, which has none, fp32."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def recorded(config) -> dict:
    """What a run that this one goes on with has written into its config.json; empty where there is none."""
    folder, anew = Path(config.out), config.overwrite or config.resume == "never"
    goes_on = not anew and any(folder.glob("checkpoint-*.pt"))
    return read_json(folder / "config.json", absent={}) if goes_on else {}


def choose_ranks(config) -> int:
    """How many processes a run on a CPU is shared between.

    Threads wait for each other after every product, ranks once a step, but ranks do the small things twice.
    They are taken where n threads are measured to be less than 2/3 n times as fast as one. A run that goes on
    keeps its own. One process where OMP_NUM_THREADS says how a machine is to be used, and with --tiny.
    """
    at_least(0, config, "ranks")
    if choose_device(config.device).type != "cpu":
        return 1
    sizes = [getattr(config, name, 0) for name in ("batch_size", "minibatch_size", "ptx_size")]
    prompts, cut = divmod(sizes[1], max(1, getattr(config, "samples", 1)))          # of a minibatch
    shared = math.gcd(*sizes, 1 if cut else prompts)                                # by ranks, equally
    if config.ranks and shared % config.ranks:
        raise UserError(f"ranks is {config.ranks}; to share every step equally it must divide {shared}"
                        + ", as many as whole prompts of a minibatch allow" * hasattr(config, "samples"))
    ranks = config.ranks or recorded(config).get("ranks", 0)
    if ranks and shared % ranks == 0:            # else the folder's run has other settings
        return ranks
    n = max(n for n in range(1, cores() + 1) if shared % n == 0)
    if n == 1 or config.tiny or "OMP_NUM_THREADS" in os.environ:
        return 1
    one, many = seconds_in_turns("cpu", (torch.float32, 1), (torch.float32, n))
    return n if one / many < n * 2 / 3 else 1


def choose_threads(device, world: int, before: int = 0) -> int:
    """As many threads as this rank has cores, unless one is measured to be faster. before: what an
    interrupted run has used; it goes on with that, where the cores are there: with others a sum may end
    in other bits.
    """
    if "OMP_NUM_THREADS" in os.environ and world == 1:
        return torch.get_num_threads()
    n = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", world)))      # torchrun's, on this machine
    if before:
        n = min(n, before)
    elif device.type == "cpu" and n > 1:
        one, many = seconds_in_turns("cpu", (torch.float32, 1), (torch.float32, n))
        n = 1 if one < 0.95 * many else n
    torch.set_num_threads(n)
    return n


def choose_dtype(name: str, device, before: str = "") -> tuple[torch.dtype, str]:
    """bf16 where it is measured to be faster. Returns the dtype and the reason, in words.

    before: what an interrupted run has used; it goes on with that.
    """
    names = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if name in names:
        return names[name], f"{name} as asked"
    if name != "auto":
        raise UserError(f"dtype {name!r} is unknown; try auto, fp32 or bf16")
    if before in names:
        return names[before], f"{before} as before"
    if device.type == "mps":
        return torch.float32, "fp32 (the safe choice on mps)"
    fp32, bf16 = seconds_in_turns(device, *((dtype, 0) for dtype in names.values()))
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

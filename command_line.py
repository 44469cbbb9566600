"""The program around main(config): flags in, exit code out, and on a CPU as many processes as it likes best.

The Config dataclass of a script is its command line: a field is a flag, the comment behind it its help.
"""
import argparse
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

import hardware
from common import apply_tiny, speaks
from errors import Fault, UserError

METAVAR = {str: "TEXT", int: "N", float: "X"}
GOES_ON = "the same command, without --overwrite, goes on from the last checkpoint"


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def parse(config_class, argv: list[str], description: str):
    """--field value for every field; the comment behind a field is its help. Unknown flags are refused."""
    comments = dict(re.findall(r"^    (\w+):.*?#\s*(.+)$", inspect.getsource(config_class), re.MULTILINE))
    parser = Parser(prog=Path(sys.argv[0]).name, description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(config_class):
        help_text = f"{comments.get(field.name, '')} ({field.default!r})".replace("%", "%%")
        if field.type is bool:
            parser.add_argument(f"--{field.name}", action="store_true", default=field.default, help=help_text)
        else:
            parser.add_argument(f"--{field.name}", type=field.type, default=field.default, help=help_text,
                                metavar=METAVAR[field.type])
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        flags = [f"--{field.name}" for field in dataclasses.fields(config_class)]
        near = difflib.get_close_matches(flag, flags, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists all flags"
        raise UserError(f"unknown flag {flag}; {hint}")
    return config_class(**vars(known))


def run(main, config_class, description: str, parse=parse) -> None:
    """Parse, start other ranks where that pays, run main(config). No traceback for a user's mistake. parse: a
    script's own, where its command line is more than flags.
    """
    goes_on = f"; {GOES_ON}" if hasattr(config_class, "resume") else ""

    def stop(signum, frame):
        raise SystemExit(_say(f"stopped{goes_on}", 128 + signum))
    signal.signal(signal.SIGTERM, stop)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if hasattr(stream, "reconfigure"):   # bytes that are no text come in, letters that it lacks go out
            stream.reconfigure(errors=errors)
    others: list[subprocess.Popen] = []
    try:
        config = parse(config_class, sys.argv[1:], description)
        if hasattr(config, "ranks"):
            apply_tiny(config)
            if "WORLD_SIZE" not in os.environ:
                others = start_ranks(hardware.choose_ranks(config))
        main(config)
    except UserError as error:
        sys.exit(_say(error, 2))
    except BrokenPipeError:                  # whoever read our output has seen enough, or has died
        sys.stdout = open(os.devnull, "w")
        sys.exit(128 + getattr(signal, "SIGPIPE", 13))
    except (Fault, OSError) as error:        # the latter: a full disk, a folder that is a file, no permission
        sys.exit(_say(error, 1))
    except KeyboardInterrupt:
        sys.exit(_say(f"interrupted{goes_on}", 128 + signal.SIGINT))
    except (RuntimeError, MemoryError) as error:
        if memory := _full(error):           # one rank may meet it alone
            hint = "; a smaller --micro_batch_size needs less" * hasattr(config_class, "micro_batch_size")
            where = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""
            sys.exit(_say(f"the {memory} is full{where}{hint}{goes_on}", 1, alone=True))
        if not any(other.poll() for other in others):
            raise
        sys.exit(_say(f"a process of this run has died; {GOES_ON}", 1))
    finally:
        # subtle: NCCL waits here for every rank, and after a mistake the others may never come
        if dist.is_initialized() and not (sys.exc_info()[0] and dist.get_backend() == "nccl"):
            dist.destroy_process_group()
        for other in others:
            with contextlib.suppress(subprocess.TimeoutExpired):       # they end as this rank has ended,
                other.wait(timeout=10)
            other.kill()                                               # or wait for it in vain


def start_ranks(n: int) -> list[subprocess.Popen]:
    """Become rank 0 of n processes that all run this command, as under torchrun. Returns the others."""
    if n == 1:
        return []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0",
                      LOCAL_RANK="0")
    others = [subprocess.Popen([sys.executable, *sys.argv],
                               env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)})
              for rank in range(1, n)]
    threading.Thread(target=_watch, args=(others,), daemon=True).start()
    return others


def _watch(others: list[subprocess.Popen]) -> None:
    """Where another rank dies, this one may be waiting for it in a call that nothing interrupts."""
    while all(other.poll() in (None, 0) for other in others):
        time.sleep(0.5)
    time.sleep(10)                   # if it was a mistake of the user, this rank is about to say so itself
    _say(f"a process of this run has died; {GOES_ON}", 1)
    os._exit(1)


def _full(error: Exception) -> str:
    """Which memory an error says is full, if it does."""
    if isinstance(error, torch.OutOfMemoryError):
        return "GPU's memory"
    return "memory" if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error) else ""


def _say(message, code: int, alone: bool = False) -> int:
    if alone or speaks():                    # the ranks share their mistakes; one speaks for all
        print(f"error: {message}", file=sys.stderr)
    return code

"""Two ways in which a program ends early, and checks that end it so. command_line.py makes a sentence and
an exit code of them.
"""
import json
import math
import os
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A mistake that the user can mend, found before anything is written: exit code 2."""


class Fault(Exception):
    """Something broke on the way: exit code 1, the last checkpoint is kept."""


def at_least(least: int, config, *names: str) -> None:
    """Refuse a setting below `least`, or one that is not finite, of these names those that config has."""
    for name in names:
        value = getattr(config, name, least)
        if not least <= value < math.inf:                               # nan is not either
            raise UserError(f"{name} is {value}; it must be at least {least}" + ", and finite" * (value > 0))


def check_seed(config) -> None:
    """Refuse a seed that not every generator takes."""
    at_least(0, config, "seed")
    if config.seed >= 2 ** 32:
        raise UserError(f"seed is {config.seed}; it must be below 2^32")


def read_json(path: Path, absent: Any = None, kind: type = dict) -> Any:
    """The content of a file that must hold an object (kind: or a list). absent: what to return where there is
    no file; None: refuse.
    """
    if absent is not None and not os.path.exists(path):             # nor does a name that is too long
        return absent
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, kind):
        raise UserError(f"{path} holds no JSON {'object' if kind is dict else kind.__name__}")
    return content

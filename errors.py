"""Two ways in which a program ends early, and two checks that end it so. command_line.py makes a sentence and
an exit code of them.
"""
import json
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A mistake that the user can mend: exit code 2, nothing written."""


class Fault(Exception):
    """Something broke on the way: exit code 1, the last checkpoint is kept."""


def at_least(least: int, config, *names: str) -> None:
    """Refuse a setting below `least`, of these names those that config has."""
    for name in names:
        value = getattr(config, name, least)
        if not value >= least:                                          # nan is not either
            raise UserError(f"{name} is {value}; it must be at least {least}")


def read_json(path: Path, absent: Any = None) -> Any:
    """The content of a file in a run folder. absent: what to return where there is none; None: refuse."""
    if absent is not None and not Path(path).exists():
        return absent
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None

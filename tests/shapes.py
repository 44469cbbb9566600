"""Shapes live in names: `logits_BTV` has three dimensions, and its B is that of all names of its call."""
import re
import sys
from collections import Counter
from pathlib import Path

from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent


def check_shapes(function, *arguments, **named):
    """Call the function; whenever a function of this repository returns, compare its locals with their names.

    Returns (result, Counter: function name -> number of suffixed tensors seen), or raises AssertionError.
    A local integer of one capital letter, as in `B, T = tokens_BT.shape`, must agree too.
    """
    wrong, seen = [], Counter()

    def at_return(frame, event, _):
        if event == "return":
            sizes = {name: (name, x) for name, x in frame.f_locals.items()
                     if re.fullmatch("[A-Z]", name) and type(x) is int}
            for name, x in frame.f_locals.items():
                suffix = re.search(r"_([A-Z]+)$", name)
                if not suffix or not isinstance(x, Tensor):
                    continue
                seen[frame.f_code.co_name] += 1
                known = [sizes.setdefault(letter, (name, n))[1] for letter, n in zip(suffix[1], x.shape)]
                if len(suffix[1]) != x.dim() or known != list(x.shape):
                    wrong.append(f"{frame.f_code.co_name}: {name} has shape {tuple(x.shape)}; known: {sizes}")
        return at_return

    def at_call(frame, event, _):
        frame.f_trace_lines = False
        return at_return if Path(frame.f_code.co_filename).parent == REPOSITORY else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        result = function(*arguments, **named)
    finally:
        sys.settrace(before)
    assert not wrong, "\n".join(wrong)
    return result, seen

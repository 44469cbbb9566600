"""A reward of one's own in place of the reward model: any function reward(prompt, response) -> float.

    python train_ppo.py --reward my_rewards.py:short        where my_rewards.py holds, for instance,

    def short(prompt: str, response: str) -> float:
        return -len(response.split())

Policy gradients ask nothing of a reward but its value: it need not be differentiable, nor learnt (Williams
1992). Keep it near the spread of a reward model, 1, or change --beta with it.
"""
import importlib.util
import sys
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

import common
from errors import Fault, UserError
from tokenizer import Tokenizer


def is_function(name: str) -> bool:
    """Whether --reward is file.py:function, not the folder of a reward model (which may be on a drive C:)."""
    return ":" in Path(name).name or name.endswith(".py")


def load_function(name: str) -> Callable[[str, str], float]:
    """file.py:function -> the function."""
    path, _, function = name.rpartition(":")
    if name.endswith(".py"):
        raise UserError(f"--reward {name}: name the function in it too, {name}:function")
    if not Path(path).is_file():
        raise UserError(f"--reward {name}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"reward_of_{Path(path).stem}", path)
    if spec is None:
        raise UserError(f"--reward {name}: {path} is no Python file (.py)")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.append(str(Path(path).resolve().parent))               # it may import what stands beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward {name}: {path} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"--reward {name}: {path} has no function {function!r}")
    return found


class RewardFunction(torch.nn.Module):
    """The function as a module. What goes wrong in it is reported as a sentence."""

    def __init__(self, name: str, tokenizer: Tokenizer, run: common.Run):
        super().__init__()
        self.name, self.function, self.tokenizer, self.run = name, load_function(name), tokenizer, run
        self.tried = False

    def forward(self, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
        """A score for each answer to its prompt (N,)."""
        scores, mistake, decode = [], "", self.tokenizer.decode
        try:
            scores = [self.score(decode(prompt), decode(answer)) for prompt, answer in zip(prompts, answers)]
        except UserError as error:
            mistake = str(error)
        # each rank scores answers of its own: all stop where one has met a mistake
        if said := next(filter(None, self.run.gather(mistake)), ""):
            raise (Fault if self.tried else UserError)(said)        # the first time nothing is written yet
        self.tried = True
        return torch.tensor(scores)

    def score(self, prompt: str, response: str) -> float:
        try:
            value = self.function(prompt, response)
        except (Exception, SystemExit) as error:
            raise UserError(f"--reward {self.name} failed with {type(error).__name__}: {error}; "
                            f"the prompt was {prompt!r}, the response {response!r}") from error
        try:
            finite = torch.tensor(float(value)).isfinite()                                  # as fp32 holds it
            if isinstance(value, (str, bytes)) or not finite:
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"--reward {self.name} gave {value!r} for the prompt {prompt!r} "
                            f"and the response {response!r}; a reward must be a finite number") from None
        return float(value)

"""A reward of one's own in place of the reward model: any function reward(prompt, response) -> float.

    python train_ppo.py --reward my_rewards.py:short        where my_rewards.py holds, for instance,

    def short(prompt: str, response: str) -> float:
        return -len(response.split())

Policy gradients ask nothing of a reward but its value: it need not be differentiable, nor learnt (Williams
1992). Keep it near the spread of a reward model, 1, or change --beta with it.
"""
import importlib.util
import math
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

import data
from errors import UserError
from tokenizer import Tokenizer


def is_function(name: str) -> bool:
    """Whether --reward is file.py:function, not the folder of a reward model (which may be on a drive C:)."""
    return ":" in Path(name).name


def load_function(name: str) -> Callable[[str, str], float]:
    """file.py:function -> the function."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"--reward {name}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None:
        raise UserError(f"--reward {name}: {path} is no Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--reward {name}: {path} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"--reward {name}: {path} has no function {function!r}")
    return found


def texts_of(batch: data.Batch, tokenizer: Tokenizer) -> dict[int, tuple[str, str]]:
    """document -> (prompt, response): what a packed batch holds, as text without special tokens."""
    rows = [(batch.tokens, batch.document, batch.part)]
    if batch.source is not None:
        rows.append((batch.source, batch.source_document, torch.zeros_like(batch.source)))
    tokens: dict[int, tuple[list, list]] = {}
    for columns in rows:
        for token, document, part in zip(*(column.flatten().tolist() for column in columns)):
            if document >= 0 and token in tokenizer.text:
                tokens.setdefault(document, ([], []))[part].append(token)
    return {document: (tokenizer.decode(prompt), tokenizer.decode(response))
            for document, (prompt, response) in tokens.items()}


class RewardFunction(torch.nn.Module):
    """The function, called as a model.ScalarModel is: one score per answer of a batch."""

    def __init__(self, name: str, tokenizer: Tokenizer):
        super().__init__()
        self.name, self.function, self.tokenizer = name, load_function(name), tokenizer

    def forward(self, batch: data.Batch, masks, where_BT: Tensor) -> Tensor:
        """Scores (N,) of the documents that stand where `where` is True, row by row."""
        texts = texts_of(batch, self.tokenizer)
        scores = [self.score(*texts[document]) for document in batch.document[where_BT].tolist()]
        return torch.tensor(scores, device=where_BT.device)

    def score(self, prompt: str, response: str) -> float:
        try:
            value = float(self.function(prompt, response))
        except Exception as error:
            raise UserError(f"--reward {self.name} failed with {type(error).__name__}: {error}; "
                            f"the prompt was {prompt!r}, the response {response!r}") from error
        if not math.isfinite(value):
            raise UserError(f"--reward {self.name} gave {value} for the prompt {prompt!r} "
                            f"and the response {response!r}; a reward must be a finite number")
        return value

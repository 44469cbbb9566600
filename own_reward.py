"""A reward of one's own in place of the reward model: any function reward(prompt, response) -> float.

    python train_ppo.py --reward my_rewards.py:short        where my_rewards.py holds, for instance,

    def short(prompt: str, response: str) -> float:
        return -len(response.split())

Policy gradients ask nothing of a reward but its value: it need not be differentiable, nor learnt (Williams
1992). Keep it near the spread of a reward model, 1, or change --beta with it.
"""
import importlib.util
import sys
from collections import defaultdict
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

import common
import data
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


def texts_of(batch: data.Batch, tokenizer: Tokenizer) -> dict[int, tuple[str, str]]:
    """Answer -> (prompt, response): what a packed batch holds, as text without special tokens."""
    if batch.source is None:
        in_source = (batch.part == 0) & (batch.document >= 0)
        sources = batch.document[in_source], batch.tokens[in_source]
    else:
        sources = batch.source_document[batch.source_document >= 0], batch.source[batch.source_document >= 0]
    prompts, texts = defaultdict(list), {}
    for document, token in zip(*(column.tolist() for column in sources)):
        prompts[document].append(token)
    here = batch.loss_mask
    columns = (data.answer_of_token(batch, here), batch.document[here], batch.part[here], batch.tokens[here],
               batch.targets[here])
    for answer, document, part, token, target in zip(*(column.tolist() for column in columns)):
        if answer not in texts:              # in front of it stands the prompt's last token, or <bos>
            texts[answer] = prompts[document] + [token] * (part > 0), []
        texts[answer][1].append(target)
    return {answer: tuple(tokenizer.decode([token for token in tokens if token in tokenizer.text])
                          for tokens in pair) for answer, pair in texts.items()}


class RewardFunction(torch.nn.Module):
    """The function, called as a model.ScalarModel is: one score per answer of a batch."""

    def __init__(self, name: str, tokenizer: Tokenizer, run: common.Run):
        super().__init__()
        self.name, self.function, self.tokenizer, self.run = name, load_function(name), tokenizer, run
        self.tried = False

    def forward(self, batch: data.Batch, masks, where_BT: Tensor) -> Tensor:
        """Scores (N,) of the answers that stand where `where` is True, row by row."""
        texts, scores, mistake = texts_of(batch, self.tokenizer), [], ""
        try:
            scores = [self.score(*texts[answer]) for answer in data.answer_of_token(batch, where_BT).tolist()]
        except UserError as error:
            mistake = str(error)
        # each rank scores answers of its own: all stop where one has met a mistake
        if said := next(filter(None, self.run.gather({self.run.rank: mistake}).values()), ""):
            raise (Fault if self.tried else UserError)(said)        # the first time nothing is written yet
        self.tried = True
        return torch.tensor(scores, device=where_BT.device)

    def score(self, prompt: str, response: str) -> float:
        try:
            value = self.function(prompt, response)
        except (Exception, SystemExit) as error:
            raise UserError(f"--reward {self.name} failed with {type(error).__name__}: {error}; "
                            f"the prompt was {prompt!r}, the response {response!r}") from error
        try:
            if isinstance(value, str) or not torch.tensor(float(value)).isfinite():     # as fp32 holds it
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"--reward {self.name} gave {value!r} for the prompt {prompt!r} "
                            f"and the response {response!r}; a reward must be a finite number") from None
        return float(value)

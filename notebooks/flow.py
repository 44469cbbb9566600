"""What the measurements of claims.py share: the runs of one seed, trained once; figures of their answers."""
import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common                                   # noqa: E402  (the line above makes these importable)
import evaluate                                 # noqa: E402
import hardware                                 # noqa: E402
import train_pretrain                           # noqa: E402
import train_ppo                                # noqa: E402
import train_rm                                 # noqa: E402
import train_sft                                # noqa: E402

try:
    from fcntl import LOCK_EX, flock
except ImportError:                             # Windows has none: there one worker does everything
    flock, LOCK_EX = (lambda file, operation: None), None

WORKERS = 1 if LOCK_EX is None else hardware.cores()


@dataclass
class Flow:
    """The runs of one seed. Each method trains what is missing and returns the folder."""
    config: object                      # of claims.py
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.config.out) / str(self.seed)

    def train(self, stage, name: str, **settings) -> str:
        """stage.main with these settings, evaluated at the end alone; its output in <name>.txt. One process
        at a time may train a run.
        """
        out = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        shared = dict(data=self.config.data, seed=self.seed, tiny=self.config.tiny, dtype="fp32",
                      device="cpu", out=str(out), eval_every=0)
        with open(self.folder / f"{name}.txt", "a") as file, contextlib.redirect_stdout(file):
            flock(file, LOCK_EX)
            stage.main(stage.Config(**shared | settings))
        return str(out)

    def pretrain(self) -> str:
        return self.train(train_pretrain, "pretrain")

    def sft(self, name: str = "sft", **settings) -> str:
        return self.train(train_sft, name, **dict(init=self.pretrain()) | settings)

    def rm(self, name: str = "rm", **settings) -> str:
        return self.train(train_rm, name, init=self.sft(), **settings)

    def ppo(self, name: str = "ppo", **settings) -> str:
        if "reward" not in settings:
            settings["reward"] = self.rm()
        return self.train(train_ppo, name, **dict(init=self.sft()) | settings)

    def steps(self, stage, share: float) -> dict[str, int]:
        """This share of the stage's steps, a sixth of them as warm-up."""
        steps = stage.Config.TINY["steps"] if self.config.tiny else stage.Config.steps
        return dict(steps=max(2, round(share * steps)), warmup=max(1, round(share * steps / 6)))

    def part(self, stage, share: float) -> dict[str, int]:
        """This share of the stage's prompts, and of its steps: each prompt is read as often as ever."""
        prompts = stage.Config.TINY["prompts"] if self.config.tiny else stage.Config.prompts
        return dict(prompts=max(16, round(share * prompts)), **self.steps(stage, share))

    def study(self) -> evaluate.Study:
        """Held-out prompts, the human answers, the labeller, SFT as reference, the reward model."""
        self.ppo()
        return evaluate.load_study(evaluate.Config(
            runs=str(self.folder), data=self.config.data, prompts=self.config.prompts,
            best_of=self.config.best_of, max_new=16 if self.config.tiny else 40, device="cpu",
            tiny=self.config.tiny))[0]


def data_of(stage, folder: str, **settings) -> tuple:
    """(config, run, data) of a finished run of the stage, some of its settings changed, loaded as it did."""
    saved = json.loads((Path(folder) / "config.json").read_text())
    usual = vars(stage.Config())                    # holds what is newer than the run
    config = stage.Config(**{name: saved.get(name, usual[name]) for name in usual} | settings)
    run = common.Run(Path(folder), torch.device("cpu"), torch.float32)
    with contextlib.redirect_stdout(None):
        return config, run, stage.load_data(config, run)


def write_records(path: Path, records: Iterable[dict]) -> str:
    """A .jsonl of them. Returns its name, for --data."""
    common.write_atomically(path, "\n".join(map(json.dumps, records)).encode())
    return str(path)


def write_pairs(path: Path, pairs: Iterable[tuple[str, str]]) -> str:
    """(prompt, response) as lines of a .jsonl. Returns its name, for --data."""
    return write_records(path, [{"prompt": prompt, "response": response} for prompt, response in pairs])


def rivals_of(study: evaluate.Study) -> dict[str, np.ndarray]:
    """The gold scores that win rates are counted against."""
    return {"human": evaluate.golds_of(study, study.human),
            "sft": evaluate.golds_of(study, evaluate.answers_of(study, study.reference, 1.0))}


def rows_of(study: evaluate.Study, rivals: dict, models: dict[str, torch.nn.Module]) -> dict[str, dict]:
    """Name -> the report's figures of its answers at temperature 1 and greedy."""
    return {name: evaluate.row_of(study, evaluate.answers_of(study, model, 1.0),
                                  evaluate.answers_of(study, model, 0.0), model, rivals)
            for name, model in models.items()}


def row_of_best(study: evaluate.Study, rivals: dict) -> dict[str, float]:
    """The same figures of the best of n SFT answers by study.reward."""
    row = evaluate.row_of(study, evaluate.best_of_n(study), None, None, rivals)
    return row | {"kl": evaluate.kl_of_best(study.config.best_of)}


def read_record(path: str | Path) -> list[dict]:
    """The lines of a .jsonl; none where there is no file."""
    return common.read_log(Path(path))


def metrics_of(folder: str, having: str = "step") -> list[dict]:
    """The lines of a run's log that have this figure: one that was resumed may have an evaluation alone."""
    return [row for row in read_record(Path(folder) / "metrics.jsonl") if having in row]

"""Checkpoints: written atomically, read back whole or not at all, resumed exactly.

A checkpoint is one file, `checkpoint-<step>.pt`: sizes and settings, the weights, the optimizer. There is no
random state in it, because there is none to keep: what a step reads and samples is a function of (seed, step,
rank) alone. That is why an interrupted run, resumed, ends in the same weights as an uninterrupted one, bit by
bit (on a CPU: a GPU's backward passes add in no fixed order).
"""
import dataclasses
import hashlib
import json
import pickle
import re
import sys
import zipfile
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from common import Run, command_of, replacing, speaks, write_atomically
from corpus import digest
from errors import UserError, read_json
from hardware import processor_name, recorded
from model import LanguageModel, ModelConfig, ScalarModel, build
from tokenizer import Tokenizer

# settings that may change when a run goes on; all others must be as they were
FREE = {"steps", "out", "resume", "overwrite", "device", "dtype", "ranks", "compile",
        "micro_batch_size", "log_every", "eval_every", "eval_size", "save_every", "keep"}


def save(run: Run, step: int, config, model_config: ModelConfig, **parts: Any) -> None:
    """Write checkpoint-<step>.pt and forget all but the newest config.keep. parts: whatever has a state_dict.

    The file appears under its name only when it is complete and on the disk. Rank 0 writes for all.
    """
    if run.rank:
        return
    state = {"step": step, "config": dataclasses.asdict(config),
             "model_config": dataclasses.asdict(model_config),
             **{name: part.state_dict() for name, part in parts.items()}}
    for half_written in run.folder.glob("checkpoint-*.tmp"):           # a run was killed in the middle of it
        half_written.unlink()
    try:
        with replacing(run.folder / f"checkpoint-{step:07d}.pt") as file:
            torch.save(state, file)
    except RuntimeError as error:                      # torch's own words hide what the disk has said
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    found = steps_of(run.folder)
    kept = [old for old in found if old <= step][-config.keep:]                    # later ones were damaged
    for old in set(found).difference(kept):
        (run.folder / f"checkpoint-{old:07d}.pt").unlink()


def started_from(config) -> dict[str, str]:
    """What the run starts from: of the folders `init`, `reward` and `sampler` the newest step, and a digest
    of all the settings behind it (config.json holds what that run has started from itself). Of own data and
    of an own reward, file.py:function, a digest of the files.
    """
    found, samplers, reward = {}, getattr(config, "sampler", "").split(","), getattr(config, "reward", "")
    if own_data := getattr(config, "data", ""):
        found[own_data] = f"content {digest(own_data)}"
    if (own := Path(reward.rpartition(":")[0])).is_file():
        found[reward] = f"file {hashlib.sha256(own.read_bytes()).hexdigest()[:8]}"
    for folder in (getattr(config, "init", ""), reward, *samplers):
        settings = Path(folder) / "config.json"
        if folder and (steps := steps_of(folder)):
            content = settings.read_bytes() if settings.exists() else b""
            found[folder] = f"step {steps[-1]} of run {hashlib.sha256(content).hexdigest()[:8]}"
    return found


def steps_of(folder: str | Path) -> list[int]:
    """The steps of the checkpoints in a run folder, oldest first."""
    paths = Path(folder).glob("checkpoint-*.pt")
    names = (re.fullmatch(r"checkpoint-(\d+)\.pt", path.name) for path in paths)
    return sorted(int(name.group(1)) for name in names if name)


def latest(folder: str | Path, step: int | None = None) -> dict | None:
    """The newest checkpoint that can be read, or that of `step`; None where there is none. A damaged file is
    reported and passed over.
    """
    steps = steps_of(folder) if step is None else [step]
    for step in reversed(steps):
        path = Path(folder) / f"checkpoint-{step:07d}.pt"
        try:
            with zipfile.ZipFile(path) as archive:             # torch.load compares no checksums
                if damaged := archive.testzip():
                    raise OSError(f"{damaged} has changed since it was written")
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile,
                pickle.UnpicklingError) as error:
            reason = next(iter(str(error).splitlines()), "")
            if not reason or not isinstance(error, (RuntimeError, EOFError, OSError)):
                reason = "it is no checkpoint"             # of which torch says how to load it unchecked
            if speaks():
                print(f"{path} cannot be read ({reason})" + "; trying the one before it" * (step != steps[0]))
    return None


def load_model(folder: str, context: int = 0, structure: str = "",
               step: int | None = None) -> LanguageModel | ScalarModel:
    """The model of a stage, after its newest checkpoint or that of `step`. context: tokens of a sequence that
    it will have to read. structure: what to make of a decoder, causal or prefix, which are the same network;
    left empty: what it is.
    """
    state = latest(folder, step)
    if state is None:
        raise UserError(f"{folder} holds no checkpoint that can be read; train it first")
    try:
        saved = state["model_config"]["structure"]
        if structure not in ("", saved) and "encdec" in (structure, saved):
            raise UserError(f"{folder} is {saved}, which cannot become {structure}: these are different "
                            "networks")
        with torch.device("meta"):             # no memory, no random draws: every tensor comes from the file
            model = build(ModelConfig(**state["model_config"] | dict(structure=structure or saved)))
            if "head.weight" in state["model"]:
                model = ScalarModel(model)
        model.load_state_dict(state["model"], assign=True)
    except (RuntimeError, TypeError, KeyError):
        raise UserError(f"{folder} was written by another version of this program; train it anew") from None
    if model.config.positions == "learned" and context > model.config.max_positions:
        raise UserError(f"{folder} has learned {model.config.max_positions} positions; context {context} is "
                        "longer")
    return model.float()                       # published weights are kept in the format they came in


def load_language_model(folder: str, context: int = 0, structure: str = "") -> LanguageModel:
    """The same, where a model is wanted that writes."""
    model = load_model(folder, context, structure)
    if not isinstance(model, LanguageModel):
        raise UserError(f"{folder} is a reward model: it scores answers and writes none")
    return model


def load_samplers(config, run: Run, tokenizer: Tokenizer) -> list[LanguageModel]:
    """The models whose samples are to be ranked: those of config.sampler, or the one the run starts from."""
    models = []
    for folder in [name for name in config.sampler.split(",") if name] or [config.init]:
        if (folder != config.init
                and load_tokenizer(folder, stage_of(folder, "ppo"), config.tiny).ranks != tokenizer.ranks):
            raise UserError(f"{folder} was trained on other tokens than {config.init}")
        models.append(load_language_model(folder, config.context).to(run.device))
    return models


def stage_of(folder: str, otherwise: str) -> str:
    """The stage that the folder is named after, as the default ones are; `otherwise` where it is none that
    writes.
    """
    name = Path(folder).name
    return name if name in ("pretrain", "sft", "dpo", "ppo") else otherwise


STARTS_FROM = {"sft": {"init": "pretrain"}, "rm": {"init": "sft"}, "dpo": {"init": "sft"},
               "ppo": {"init": "sft", "reward": "rm"}}


def command_for(stage: str, folder: str, tiny: bool = False) -> str:
    """The command that trains a stage into this folder: that of the run which is there, or one that starts
    from the stages beside it.
    """
    folder = Path(folder)
    saved = read_json(folder / "config.json", absent={})
    tiny = saved.get("tiny", tiny or folder.parent == Path("runs/tiny"))
    usual, command = Path("runs/tiny" if tiny else "runs"), saved.get("command_line", "")
    if not command:
        command = f"python train_{stage}.py" + " --tiny" * tiny
        for flag, name in STARTS_FROM.get(stage, {}).items():
            beside = folder.with_name(name)
            command += f" --{flag} {quote(str(beside))}" * (bool(steps_of(beside)) and beside != usual / name)
    return command + f" --out {quote(str(folder))}" * (folder != usual / stage)


def load_tokenizer(folder: str, stage: str, tiny: bool = False) -> Tokenizer:
    """The tokenizer of a stage, with a note where the stage was stopped before its end."""
    if not steps_of(folder):
        raise UserError(f"{folder} holds no checkpoint; first run: {command_for(stage, folder, tiny)}")
    if (stopped := stopped_at(folder)) and speaks():
        print(f"note: {folder} was stopped at {stopped}; to finish it: {command_for(stage, folder, tiny)}",
              file=sys.stderr)
    try:
        return Tokenizer.load(Path(folder) / "tokenizer.tiktoken")
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer of {folder} cannot be read: {error}") from None


def stopped_at(folder: str) -> str:
    """"step n of N" of a run that is not finished."""
    wanted = read_json(Path(folder) / "config.json", absent={}).get("steps", 0)
    steps = steps_of(folder)
    return f"step {steps[-1]} of {wanted}" if steps and steps[-1] < wanted else ""


def held_out_names(folder: str) -> set[str]:
    """The names that a stage has held out, and every later stage holds out too."""
    return set(read_json(Path(folder) / "held_out.json", kind=list))


def open_folder(folder: Path, config) -> dict | None:
    """Decide where this run starts; nothing is written. Returns the checkpoint to go on from, or None.

    resume=auto goes on where there is something to go on from, must insists on it, never wants an empty
    folder. A run made with other settings is not touched, unless --overwrite says so: then open_run
    removes it, once everything else is known to be right.
    """
    if config.overwrite and folder.resolve() in {Path(start).resolve() for start in started_from(config)}:
        raise UserError(f"--overwrite would remove {folder}, where this run starts; choose another --out")
    state = latest(folder) if not config.overwrite else None
    if state is None:
        if config.resume == "must":
            raise UserError(f"{folder} holds no checkpoint to resume from")
        if steps_of(folder) and not config.overwrite:
            raise UserError(f"{folder} holds checkpoints, none of which can be read; --overwrite begins anew")
        return None
    if "optimizer" not in state:
        raise UserError(f"{folder} holds imported weights; start from them with --init, and another --out")
    if config.resume == "never":
        raise UserError(f"{folder} holds a run already; choose another --out, or --overwrite it")
    step, wanted = state["step"], state["config"]["steps"]
    if config.steps <= step < wanted:                   # a reward model, for one, is normalised at its end
        raise UserError(f"{folder} was stopped at step {step} of {wanted}; to end it early, steps must be at "
                        f"least {step + 1}")
    now = dataclasses.asdict(config)
    before = dataclasses.asdict(type(config)()) | state["config"]   # what is new in Config had its default
    changed = [f"{name} {before[name]!r} -> {value!r}" for name, value in now.items()
               if name not in FREE and before[name] != value]
    start = started_from(config)                                    # what it learns is of their making
    changed += [f"{origin} at {then} -> {start.get(origin)}"
                for origin, then in recorded(config).get("started_from", start).items()
                if start.get(origin) != then]
    if changed:
        raise UserError(f"{folder} holds a run with other settings ({', '.join(changed)}); "
                        "choose another --out, or --overwrite it")
    return state


def open_run(run: Run, config, tokenizer: Tokenizer, names: set[str]) -> None:
    """Make the run folder: config.json, the tokenizer, and the names that no training set may hold."""
    if run.rank:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    if config.overwrite:                        # only now: whatever was wrong with the settings has been said
        for old in run.folder.glob("checkpoint-*.pt"):
            old.unlink()
        for name in ("metrics.jsonl", "curves.png", "samples.txt"):
            (run.folder / name).unlink(missing_ok=True)
    content = {**dataclasses.asdict(config), "ranks": run.world, "threads": torch.get_num_threads(),
               "dtype_used": run.dtype_name(), "torch": torch.__version__,
               "processor": processor_name(run.device), "started_from": started_from(config)}
    if hasattr(config, "resume"):                # a stage's, not that of weights.py
        content["command_line"] = command_of(config)
    write_atomically(run.folder / "config.json", (json.dumps(content, indent=1) + "\n").encode())
    tokenizer.save(run.folder / "tokenizer.tiktoken")
    if getattr(config, "init", ""):              # what an earlier stage held out stays held out
        names = names | held_out_names(config.init)
    write_atomically(run.folder / "held_out.json", (json.dumps(sorted(names), indent=0) + "\n").encode())


def restore(state: dict, **parts: Any) -> int:
    """Load the parts' states; returns the step to go on with."""
    for name, part in parts.items():
        part.load_state_dict(state.pop(name))            # or all of it would stay in memory to the end
    return state["step"]

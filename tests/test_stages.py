"""The four stages and DPO end to end on a small generated package: every structure, resuming, ranks, bad input."""
import contextlib
import copy
import dataclasses
import errno
import functools
import io
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import checkpoint
import claims
import command_line
import common
import corpus
import data
import evaluate
import generate
import hardware
import labeller
import masks
import model as networks
import objectives
import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from conftest import STRUCTURES
from errors import UserError
from flow import Flow

ROOT = Path(__file__).parent.parent
SMALL = dict(device="cpu", dtype="fp32", save_every=2, eval_every=2, keep=9)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder of Python files whose functions say in a docstring what they do."""
    folder = tmp_path_factory.mktemp("package")
    verbs = ("read", "write", "sort", "merge", "split", "count", "find", "remove", "update", "check")
    nouns = ("file", "table", "graph", "list", "index", "matrix", "token", "buffer", "socket",
             "record", "node", "edge")
    for verb in verbs:
        functions = [f'def {verb}_{noun}({noun}, option):\n    '
                     f'"""{verb.capitalize()} the {noun} {k} times.\n\n    '
                     f'The {noun} must be open, and option {k} decides how often it is done.\n    """\n'
                     for k, noun in enumerate(nouns)]
        (folder / f"{verb}.py").write_text("\n\n".join(functions))
    return folder


def stage_configs(structure: str, package: Path, runs: Path) -> list:
    """(main, Config) of the four stages and of DPO, small enough for a test."""
    objective = {"causal": "next_token", "prefix": "glm_130b", "encdec": "bart"}[structure]
    common_flags = dict(SMALL, data=str(package))
    return [
        (train_pretrain.main, train_pretrain.Config(
            **common_flags, out=str(runs / "pretrain"), structure=structure, objective=objective, vocab=420,
            layers=1, heads=2, kv_heads=1, width=32, steps=4, batch_size=4, context=64, warmup=2,
            eval_size=10)),
        (train_sft.main, train_sft.Config(
            **common_flags, init=str(runs / "pretrain"), out=str(runs / "sft"), steps=4, batch_size=8,
            warmup=2, eval_size=10)),
        (train_rm.main, train_rm.Config(
            **common_flags, init=str(runs / "sft"), out=str(runs / "rm"), prompts=20, answers=4, max_new=8,
            steps=4, batch_size=4, warmup=2, eval_size=5)),
        (train_ppo.main, train_ppo.Config(
            **common_flags, init=str(runs / "sft"), reward=str(runs / "rm"), out=str(runs / "ppo"), steps=4,
            batch_size=8, minibatch_size=4, samples=2, ptx_size=4, max_new=8, warmup=2, eval_size=5,
            kl_target=1.0)),
        (train_dpo.main, train_dpo.Config(
            **common_flags, init=str(runs / "sft"), out=str(runs / "dpo"), prompts=20, answers=4, max_new=8,
            steps=4, batch_size=4, warmup=2, eval_size=5)),
    ]


one_structure = pytest.mark.parametrize("flow", ["causal"], indirect=True)


@pytest.fixture(scope="module", params=STRUCTURES)
def flow(request, package, tmp_path_factory):
    """All stages of one structure: (run folders, configs, last log lines)."""
    runs = tmp_path_factory.mktemp(request.param)
    stages = stage_configs(request.param, package, runs)
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "causal":              # drawing takes longer than training, and knows no structure
            patch.setattr(common.Log, "curves", lambda log: None)
        return runs, stages, [main(config) for main, config in stages]


def test_every_stage_with_every_structure(flow):
    """Each stage ends, with finite figures, and leaves everything that the next one and the reader need."""
    runs, stages, last = flow
    for (_, config), row in zip(stages, last):
        assert row["step"] == config.steps and all(torch.isfinite(torch.tensor(float(v)))
                                                   for v in row.values())
        for name in ("config.json", "metrics.jsonl", "samples.txt", "tokenizer.tiktoken", "held_out.json",
                     *["curves.png"] * (stages[0][1].structure == "causal")):
            assert (Path(config.out) / name).stat().st_size > 0, name


@one_structure
def test_pretraining_goes_on_from_a_run(flow, no_curves, tmp_path):
    """--init: the same weights, tokenizer and held-out names, under another mask and objective if asked for;
    U-PaLM's way (Tay et al. 2022b).
    """
    runs, stages, last = flow
    config = dataclasses.replace(stages[0][1], init=str(runs / "pretrain"), out=str(tmp_path / "on"), vocab=2048,
                                 layers=3, heads=4, kv_heads=2, width=128, structure="prefix", objective="u_palm")
    train_pretrain.main(config)
    on, before = (checkpoint.load_model(str(folder)) for folder in (config.out, runs / "pretrain"))
    assert (on.config.structure, on.config.width) == ("prefix", before.config.width)
    kept = [(runs / "pretrain" / name).read_bytes() == (tmp_path / "on" / name).read_bytes()
            for name in ("tokenizer.tiktoken", "held_out.json")]
    assert kept == [True, True]
    still = dataclasses.replace(config, out=str(tmp_path / "still"), lr=0.0, structure="", objective="next_token")
    assert train_pretrain.main(still)["loss"] == pytest.approx(last[0]["loss"], abs=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(checkpoint.load_model(still.out).parameters(), before.parameters()))


@one_structure
@pytest.mark.parametrize("flags, fragment", [
    (("--width", "64"), "leave out"), (("--preset", "gpt2"), "leave out"),
    (("--structure", "encdec"), "cannot become encdec"), (("--init", "nowhere"), "python train_pretrain.py")])
def test_bad_flags_beside_init_are_one_sentence(flow, flags, fragment, monkeypatch, capsys, tmp_path, package):
    flags = ("--init", str(flow[0] / "pretrain")) * ("--init" not in flags) + flags
    assert fragment in fails(monkeypatch, capsys, train_pretrain, "--data", str(package), "--context", "64",
                             "--out", str(tmp_path / "out"), *flags)
    assert not (tmp_path / "out").exists()


def test_first_ppo_iteration_starts_at_the_reference(flow):
    """Before anything is learnt, policy and reference are one: KL is 0, and the first ratio is exactly 1."""
    runs, _, _ = flow
    rows = [json.loads(line) for line in (runs / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl"] == 0 and all(row["ratio"] == 1 for row in rows)


@one_structure
@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_ppo_with_prompts_alone_and_an_own_reward(flow, no_curves, capsys, advantage, tmp_path, monkeypatch):
    """No answers, no reward model, several samples of a prompt: the figures are finite, the own reward rises
    or falls with nothing but the function, and what a reward model would be asked for is not missed. What the
    figures warn of is printed.
    """
    monkeypatch.setattr(train_ppo, "warnings_of", lambda now, first: ["a sign"] if now["step"] > first["step"] else [])
    runs, stages, _ = flow
    prompts = [json.dumps({"prompt": f"def read_{noun}(path):\n# read {noun}\n"}) for noun in range(30)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    (tmp_path / "mine.py").write_text("def letters(prompt, response):\n    return len(response) / 10\n")
    config = type(stages[3][1])(**{**vars(stages[3][1]), "data": str(tmp_path / "prompts.jsonl"),
                                   "reward": f"{tmp_path}/mine.py:letters", "advantage": advantage,
                                   "samples": 4, "out": str(tmp_path / "ppo"), "no_end": 0.0})
    last, printed = train_ppo.main(config), capsys.readouterr().out
    assert last["step"] == config.steps and 0 < last["reward"] < 8
    assert last["ptx_loss"] == 0 and "the data has no responses that fit" in printed
    assert printed.count("look at samples: a sign") == config.steps - 1
    assert ({"value_loss", "explained_variance"} <= set(last)) == (advantage == "gae")
    assert "--- human" not in printed and labeller.NO_GOLD not in printed
    assert f'next: python generate.py --run {config.out} --prompt "..."' in printed
    saved = checkpoint.latest(tmp_path / "ppo")
    assert ("value" in saved) == (advantage == "gae")                # RLOO and GRPO have no value model


@pytest.mark.parametrize("flags, fragment", [
    (("--advantage", "guess"), "guess"), (("--advantage", "rloo", "--samples", "1"), "at least 2"),
    (("--kl_target", "6", "--beta", "0"), "kl_target"), (("--samples", "3"), "samples"), (("--kl_estimator", "k4"), "k4"), (("--value_init", "zero"), "zero"),
    (("--reward", "absent.py:reward"), "absent.py"), (("--minibatch_size", "3"), "minibatch_size"),
    (("--minibatch_size", "0"), "minibatch_size"), (("--epochs", "0"), "epochs"), (("--ptx_size", "0"), "ptx_size"),
    (("--temperature", "0"), "temperature"), (("--temperature", "inf"), "temperature"), (("--value_lr", "-1"), "value_lr"), (("--beta", "nan"), "beta"),
    (("--ptx", "-1"), "ptx"), (("--score_clip", "-1"), "score_clip"), (("--max_new", "128"), "no room"), (("--seed", "-1"), "seed"), (("--row", "0"), "row"),
    (("--beta", "-1"), "beta"), (("--lam", "7"), "lam"), (("--advantage", "rloo", "--lam", "1"), "lam: rloo"), (("--ratio_clip", "-1"), "ratio_clip"),
    (("--value_clip", "0"), "value_clip is 0.0; it must be above 0"), (("--advantage", "grpo", "--whiten_rewards"), "whole answers")])
@one_structure
def test_bad_ppo_flags_are_one_sentence(flow, flags, fragment, monkeypatch, capsys, tmp_path, package):
    """Said before anything is written."""
    runs, _, _ = flow
    usual = ("--data", str(package), "--init", str(runs / "sft"), "--reward", str(runs / "rm"), "--max_new", "8",
             "--out", str(tmp_path / "out"), "--batch_size", "8", "--minibatch_size", "4")
    error = fails(monkeypatch, capsys, train_ppo, *usual, *flags)
    assert fragment in error and not (tmp_path / "out").exists()


@one_structure
def test_a_reward_model_of_another_structure_is_refused(flow, tmp_path, package, no_curves):
    """It would read an answer from rows laid out for the policy: an encoder-decoder's hold no prompt."""
    runs, stages, _ = flow
    other = dataclasses.replace(stages[0][1], structure="prefix", out=str(tmp_path / "prefix"), steps=1)
    train_pretrain.main(other)
    with pytest.raises(UserError, match="rm is causal, .*prefix is prefix"):
        train_ppo.main(dataclasses.replace(stages[3][1], init=other.out, out=str(tmp_path / "ppo")))
    assert not (tmp_path / "ppo").exists()


@pytest.mark.parametrize("wrong", [{"prompts": 0}, {"samples": 0}, {"best_of": 0}, {"max_new": 0},
                                   {"cool": 0.0}, {"cool": -1.0}, {"cool": float("nan")}, {"seed": -1}])
def test_a_report_of_nothing_is_refused(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is"):
        evaluate.main(evaluate.Config(**wrong))


@one_structure
def test_the_next_command_names_an_unusual_folder(flow, capsys):
    runs, stages, _ = flow
    _, config = stages[0]
    run = common.Run(Path(config.out), torch.device("cpu"), torch.float32)
    for told in (config, train_pretrain.Config(), train_pretrain.Config(tiny=True, out="runs/tiny/pretrain")):
        run.finish("python train_sft.py" + common.passed_on(told, "--init"))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next")]
    assert said == [f"next: python train_sft.py --init {config.out}", "next: python train_sft.py",
                    "next: python train_sft.py --tiny"]
    rm = train_rm.Config(init="runs/my_sft", out="runs/my_rm")
    assert common.passed_on(rm, "--reward", "init") == " --reward runs/my_rm --init runs/my_sft"
    of_tiny_ones = train_rm.Config(init="runs/tiny/sft", out="runs/tiny/rm")                    # without --tiny
    assert common.passed_on(of_tiny_ones, "--reward", "init") == " --reward runs/tiny/rm --init runs/tiny/sft"
    assert common.passed_on(train_sft.Config(out="my runs/sft"), "--init") == " --init 'my runs/sft'"
    assert train_ppo.following(train_ppo.Config(out="my runs/ppo")) == "python evaluate.py --runs 'my runs'"
    for out, own, following in (("runs/ppo", "", "python evaluate.py"), ("mine/ppo", "", "python evaluate.py --runs mine"),
                                ("runs/tiny/ppo", "", "python evaluate.py --runs runs/tiny"),
                                ("runs/second", "", "python generate.py --run runs/second"),
                                ("runs/ppo", "mine.jsonl", 'python generate.py --run runs/ppo --prompt "..."')):
        assert train_ppo.following(train_ppo.Config(out=out, data=own)).startswith(following)


def test_dpo_learns_from_the_reward_models_comparisons(flow):
    """The same seed gives both the very same prompts, answers, rankings and mistakes; and generate.py reads a run of DPO."""
    runs, stages, _ = flow
    loaded = []
    for stage, module in ((2, train_rm), (4, train_dpo)):
        config = module.Config(**{**vars(stages[stage][1]), "label_noise": 0.3})
        loaded.append(module.load_data(config, common.Run(runs, torch.device("cpu"), torch.float32)))
    assert loaded[0].train == loaded[1].train and loaded[0].held_out == loaded[1].held_out
    assert not any(parameter.requires_grad for parameter in loaded[1].reference.parameters())
    answers = generate.main(generate.Config(run=str(runs / "dpo"), prompt="def read_area(width):", max_new=4,
                                            device="cpu"))
    assert len(answers) == 1


def test_no_held_out_name_is_trained_on(flow, package):
    """The names that pretraining holds out are held out by every later stage, and no stage trains on one."""
    runs, stages, _ = flow
    names = [checkpoint.held_out_names(str(runs / stage)) for stage in ("pretrain", "sft", "rm", "ppo", "dpo")]
    assert names[0] and all(names[0] <= later for later in names[1:])
    for main, config in stages[1:]:
        loaded = sys.modules[main.__module__].load_data(config, common.Run(runs, torch.device("cpu"), torch.float32))
        trained = {corpus.function_name(loaded.tokenizer.decode(example.source)) for example in loaded.train}
        assert len(trained) > 10 and not trained & names[0]


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("stage", range(5), ids=("pretrain", "sft", "rm", "ppo", "dpo"))
def test_resumed_equals_uninterrupted(flow, stage, tmp_path):
    """Stopped at step 2 and resumed, a run ends in the same weights, bit by bit."""
    _, stages, _ = flow
    main, config = stages[stage]
    folder = tmp_path / "resumed"
    shutil.copytree(config.out, folder)
    (folder / "checkpoint-0000004.pt").unlink()
    main(type(config)(**{**vars(config), "out": str(folder), "resume": "must"}))
    whole, resumed = (torch.load(Path(out) / "checkpoint-0000004.pt") for out in (config.out, folder))
    assert resumed["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]      # beta, in PPO
    for part in ("model", "value") if stage == 3 else ("model",):
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, resumed[part][name]), (part, name)


@one_structure
def test_label_noise_is_in_the_training_comparisons_alone(flow, monkeypatch, capsys, tmp_path):
    """Sampled and given comparisons are turned round where the model learns, and nowhere where it is measured."""
    _, stages, _ = flow
    config, run = stages[2][1], common.Run(tmp_path, torch.device("cpu"), torch.float32)
    given = [{"prompt": f"Is it {i}?", "chosen": "Yes.", "rejected": "No, it is not."} for i in range(60)]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    for path in (config.data, str(tmp_path / "given.jsonl")):
        clean, noisy = (train_rm.load_data(train_rm.Config(**{**vars(config), "data": path, "prompts": 40,
                                                              "label_noise": share}), run) for share in (0.0, 0.4))
        assert clean.held_out == noisy.held_out and not any(example.mistakes for example in clean.train)
        assert [example._replace(mistakes=()) for example in noisy.train] == clean.train
        pairs = int(data.preferences(clean.train, labeller.TIE).sum())
        assert 0.2 < sum(len(example.mistakes) for example in noisy.train) / pairs < 0.6
    for share in ("-0.1", "0.6", "nan"):
        assert "label_noise" in fails(monkeypatch, capsys, train_rm, "--label_noise", share, "--data", config.data,
                                      "--init", config.init, "--out", str(tmp_path / "out"), "--dtype", "fp32")
    assert not (tmp_path / "out").exists()


@one_structure
def test_every_source_of_comparisons_has_its_accuracy(flow, no_curves, capsys, tmp_path):
    """Two files of dialogues with two last replies: one reward model, and how well it orders each of them."""
    _, stages, _ = flow
    (tmp_path / "d").mkdir()
    for name, replies in (("helpful", ("Yes.", "no no")), ("harmless", ("Please do not.", "yes"))):
        rows = [{key: f"\n\nHuman: {name} {i}?\n\nAssistant: {reply}"
                 for key, reply in zip(("chosen", "rejected"), replies)} for i in range(60)]
        (tmp_path / "d" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = train_rm.Config(**{**vars(stages[2][1]), "data": str(tmp_path / "d"), "out": str(tmp_path / "rm"),
                                "prompts": 100, "eval_size": 50})
    last, printed = train_rm.main(config), capsys.readouterr().out
    assert -1 <= last["length_correlation"] <= 1
    n = {name: last[f"pairs_{name}"] for name in ("helpful", "harmless")}
    mean = sum(n[name] * last[f"accuracy_{name}"] for name in n) / sum(n.values())
    assert last["accuracy"] == pytest.approx(mean) and min(n.values()) > 0
    assert all(f"{name}: accuracy {last[f'accuracy_{name}']:.3f} on {n[name]} held-out" in printed for name in n)


@one_structure
def test_own_comparisons_are_not_called_the_models(flow, no_curves, tmp_path):
    """samples.txt of comparisons that people made: chosen and rejected, neither human nor model."""
    _, stages, _ = flow
    rows = [{"prompt": f"Is it {i}?", "chosen": "Yes.", "rejected": "No no."} for i in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for main, config in (stages[2], stages[4]):
        out = tmp_path / Path(config.out).name
        main(dataclasses.replace(config, data=str(tmp_path / "d.jsonl"), out=str(out)))
        written = (out / "samples.txt").read_text()
        assert "--- chosen" in written and "--- human" not in written
        assert ("--- rejected" in written, "--- model" in written) == (main is stages[2][0], main is stages[4][0])


@one_structure
def test_a_value_model_learns_at_its_own_rate(flow, no_curves, tmp_path):
    """--lr 0 --value_lr x: the policy stays, the value model learns."""
    runs, stages, _ = flow
    main, config = stages[3]
    out = dataclasses.replace(config, out=str(tmp_path / "ppo"), lr=0.0, value_lr=1e-3, ptx=0.0)
    main(out)
    saved, sft, rm = (checkpoint.latest(folder) for folder in (out.out, runs / "sft", runs / "rm"))
    assert all(torch.equal(saved["model"][name], sft["model"][name]) for name in sft["model"])
    assert any(not torch.equal(saved["value"][name], rm["model"][name]) for name in rm["model"])


@one_structure
def test_a_reward_that_fails_on_another_rank_is_told(flow, package, tmp_path):
    """Each rank scores answers of its own: rank 0 speaks for the one that met the mistake."""
    runs, _, _ = flow
    (tmp_path / "mine.py").write_text("import os\n\n\ndef reward(prompt, response):\n"
                                      "    return 1 / (1 - int(os.environ['RANK']))\n")
    failed = subprocess.run(
        [sys.executable, str(ROOT / "train_ppo.py"), "--init", str(runs / "sft"), "--data", str(package), "--ranks", "2",
         "--dtype", "fp32", "--device", "cpu", "--reward", f"{tmp_path}/mine.py:reward", "--out", str(tmp_path / "ppo"),
         "--max_new", "8", "--batch_size", "8", "--minibatch_size", "8"], capture_output=True, text=True, timeout=120,
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert failed.returncode == 2 and len(errors) == 1 and "ZeroDivisionError" in errors[0], failed.stderr
    assert not (tmp_path / "ppo").exists()


@one_structure
def test_a_report_of_runs_whose_logs_say_little(flow, package, tmp_path):
    """A base that was imported has no log, one that was stopped early no evaluation: what they lack is left out."""
    runs, _, _ = flow
    for stage in ("pretrain", "sft"):
        shutil.copytree(runs / stage, tmp_path / "runs" / stage)
    log = tmp_path / "runs" / "pretrain" / "metrics.jsonl"
    (tmp_path / "runs" / "sft" / "config.json").write_text('{"layout": "llama"}')          # as weights.py writes it
    for line in ('{"step": 1, "seconds": 2.0}\n', None):
        log.write_text(line) if line else log.unlink()
        report = evaluate.main(evaluate.Config(runs=str(tmp_path / "runs"), data=str(package), prompts=5, best_of=2,
                                               max_new=8, device="cpu"))
        assert "bits_per_byte" not in report["base"] and ("pretrain" in report["seconds"]) == bool(line)


@one_structure
def test_a_report_on_other_text_says_what_gold_is_not(flow, tmp_path, capsys):
    for stage in ("pretrain", "sft"):
        shutil.copytree(flow[0] / stage, tmp_path / "runs" / stage)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(f'{{"prompt": "Say {n}.", "response": "It is {n}."}}\n' for n in range(40)))
    evaluate.main(evaluate.Config(runs=str(tmp_path / "runs"), data=str(pairs), prompts=2, max_new=4, device="cpu"))
    assert labeller.NO_GOLD in capsys.readouterr().out


def test_the_report_covers_all_rows(flow, package):
    """evaluate.py writes its three files, and each row has its figures."""
    runs, _, _ = flow
    report = evaluate.main(evaluate.Config(runs=str(runs), data=str(package), prompts=5, best_of=2, max_new=8,
                                           device="cpu"))
    assert json.loads((runs / "report.json").read_text()) == report
    assert (runs / "report.png").stat().st_size > 0 and "| ppo |" in (runs / "report.md").read_text()
    for row in ("base", "sft", "best_of_n", "dpo", "ppo", "human"):
        assert 0 <= report[row]["gold_low"] <= report[row]["gold"] <= report[row]["gold_high"] <= 1
    assert abs(report["sft"]["kl"]) < 1e-4
    assert {row for row in evaluate.ROWS if "loss" in report[row]} == {"base", "sft", "sft_cool", "dpo", "ppo"}
    assert {row for row in evaluate.ROWS if "entropy" in report[row]} == {"base", "sft", "sft_cool", "dpo", "ppo"}
    assert {"accuracy", "accuracy_human_sample"} <= set(report["reward_model"])


@one_structure
@pytest.mark.parametrize("claim", ["rl_against_sft", "relevance", "second_round", "diversity", "ptx", "over_optimisation",
                                   "reward_model_accuracy", "reward_model_data", "reward_model_boundary", "stability",
                                   "hackable", "structures", "structures_and_objectives", "equal_arithmetic",
                                   "pretraining_settings", "width_transfer", "pretraining_for_sft", "loss_on_prompt",
                                   "sft_selection"])
def test_a_measurement_gives_the_rows_of_its_table(flow, claim, package, monkeypatch):
    """notebooks/claims.py on small runs, one of each stage in the place of all that it would train."""
    monkeypatch.setattr(Flow, "folder", flow[0])
    monkeypatch.setattr(Flow, "train", lambda self, stage, *name, **settings:
                        str(flow[0] / stage.__name__.removeprefix("train_")))
    config = claims.Config(data=str(package), prompts=6, best_of=2, tiny=True)
    monkeypatch.setattr(evaluate.Config, "TINY", {})
    monkeypatch.setattr(corpus, "corpus_files", lambda tiny: corpus.python_files(package, ""))
    rows = json.loads(json.dumps(claims.measured(config, claim, seed=1)))
    assert rows and all((row["claim"], row["seed"]) == (claim, 1) for row in rows)
    assert set(claims.COLUMNS.get(claim, ())) <= {name for row in rows for name in row} | {"warned_at"}
    if claim == "rl_against_sft":
        without = {row["row"]: set(claims.QUALITY) - set(row) for row in rows}
        assert {row: names for row, names in without.items() if names} == {"best_of_n": {"loss"},
                                                                           "human": {"kl", "loss"}}


@one_structure
def test_several_answers_to_a_prompt_are_averaged(flow, package):
    """As if each were a report of its own; the interval is over prompts, whose means vary less than answers."""
    study, models = evaluate.load_study(evaluate.Config(runs=str(flow[0]), data=str(package), prompts=8, max_new=8,
                                                        device="cpu"))
    some, others = (evaluate.answers_of(dataclasses.replace(study, config=dataclasses.replace(study.config, seed=seed)),
                                        models["ppo"], 1.0) for seed in (1, 2))
    human, sft = evaluate.golds_of(study, study.human), evaluate.golds_of(study, others)
    rivals = {"human": human, "sft": np.concatenate((sft, sft))}
    one, other, both = (evaluate.row_of(study, answers, None, models["ppo"], rivals)
                        for answers in (some, others, some + others))
    assert some != others and both["distinct_2"] == one["distinct_2"]
    for name in ("gold", "about", "win_human", "win_sft", "reward", "kl", "length", "ended"):
        assert both[name] == pytest.approx((one[name] + other[name]) / 2, abs=2e-4), name


@one_structure
def test_a_copy_of_sft_is_no_distance_from_it(flow, package):
    """SFT itself is read once, a copy twice: both have the entropy of SFT and no KL."""
    study, models = evaluate.load_study(evaluate.Config(runs=str(flow[0]), data=str(package), prompts=8, max_new=8,
                                                        device="cpu"))
    answers = evaluate.answers_of(study, models["sft"], 1.0)
    itself, twin = (evaluate.distance_of(study, model, answers, 1.0)
                    for model in (models["sft"], copy.deepcopy(models["sft"])))
    assert itself["kl"] == 0 and abs(twin["kl"]) < 1e-4 and itself["entropy"] == twin["entropy"]
    assert abs(evaluate.distance_of(study, models["ppo"], answers, 1.0)["kl"]) > 1e-4


@one_structure
def test_a_run_stopped_before_its_last_line_writes_it(flow, no_curves, tmp_path):
    """Its last checkpoint is there, the line of the log is not."""
    _, stages, last = flow
    for (main, config), line in zip(stages, last):
        copy = shutil.copytree(config.out, tmp_path / Path(config.out).name)
        lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
        (copy / "metrics.jsonl").write_text("".join(lines[:-1]))
        again = main(dataclasses.replace(config, out=str(copy)))
        evaluated = [name for name in line if name in ("loss", "accuracy", "eval_gold", "eval_loss")]
        assert again["step"] == config.steps and evaluated
        assert [again[name] for name in evaluated] == pytest.approx([line[name] for name in evaluated])
        (copy / "samples.txt").unlink()                              # it was stopped after that line
        assert main(dataclasses.replace(config, out=str(copy))) == again and (copy / "samples.txt").exists()


@one_structure
def test_a_run_stopped_between_a_save_and_its_line_writes_it(flow, no_curves, tmp_path):
    """In the middle too: the log of the resumed run has every step that the other has, and its evaluation."""
    _, stages, _ = flow
    for main, config in stages:
        copy = shutil.copytree(config.out, tmp_path / Path(config.out).name)
        whole = common.read_log(copy / "metrics.jsonl")
        middle, last = checkpoint.steps_of(copy)
        (copy / f"checkpoint-{last:07d}.pt").unlink()
        (copy / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in whole if row["step"] < middle))
        main(dataclasses.replace(config, out=str(copy)))
        rows = common.read_log(copy / "metrics.jsonl")
        assert [row["step"] for row in rows] == [row["step"] for row in whole]
        for row, usual in zip(rows, whole):
            evaluated = [name for name in usual if name in ("loss", "accuracy", "eval_gold", "eval_loss")]
            assert [row[name] for name in evaluated] == pytest.approx([usual[name] for name in evaluated])


@pytest.mark.parametrize("tiny", [False, True])
def test_a_run_that_starts_from_another_has_its_sizes(tiny):
    with pytest.raises(UserError, match="has its sizes"):
        train_pretrain.set_up(train_pretrain.Config(init="runs/other", width=96, tiny=tiny))


@one_structure
def test_a_log_may_begin_with_an_evaluation_alone(flow, no_curves, tmp_path):
    """Stopped in its first evaluation, PPO has no first iteration to compare with: it goes on and does not warn."""
    main, config = flow[1][3]
    copy = shutil.copytree(config.out, tmp_path / "ppo")
    (copy / "checkpoint-0000004.pt").unlink()
    (copy / "metrics.jsonl").write_text("")
    assert main(dataclasses.replace(config, out=str(copy)))["step"] == 4
    first = common.read_log(copy / "metrics.jsonl")[0]
    assert first["step"] == 2 and "eval_gold" in first and "reward" not in first


def test_a_line_is_the_mean_of_its_interval(tmp_path):
    log = common.Log(common.Run(tmp_path, torch.device("cpu"), torch.float32), 0)
    for step, losses in ((3, (1.0, 2.0, 6.0)), (4, (5.0,))):
        for loss in losses:
            log.add({"train_loss": loss})
        log.line(step)
    assert [row["train_loss"] for row in common.read_log(tmp_path / "metrics.jsonl")] == [3.0, 5.0]


def test_a_resumed_run_counts_the_seconds_before(tmp_path):
    """Those up to its checkpoint: what came after it is done again."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "seconds": 50.0}\n{"step": 4, "seconds": 90.0}\n')
    run = common.Run(tmp_path, torch.device("cpu"), torch.float32)
    common.Log(run, 2)
    assert 50 <= run.seconds() < 90


@one_structure
def test_a_save_keeps_itself_and_not_what_was_damaged(flow, tmp_path):
    """A later checkpoint that could not be read is none of those to keep."""
    config = flow[1][1][1]
    copy = shutil.copytree(config.out, tmp_path / "sft")
    model = checkpoint.load_model(str(copy))
    (copy / "checkpoint-0000004.pt").write_bytes(b"damaged")
    run = common.Run(copy, torch.device("cpu"), torch.float32)
    checkpoint.save(run, 3, dataclasses.replace(config, keep=1), model.config, model=model)
    assert checkpoint.steps_of(copy) == [3]


def test_a_model_is_loaded_as_it_was_at_a_step(random_model, tmp_path):
    run = common.Run(tmp_path, torch.device("cpu"), torch.float32)
    models = [random_model("causal") for _ in range(2)]
    for step, model in enumerate(models, start=1):
        checkpoint.save(run, step, train_sft.Config(), model.config, model=model)
    for step, model in ((1, models[0]), (2, models[1]), (None, models[1])):
        loaded = checkpoint.load_model(str(tmp_path), step=step)
        assert torch.equal(loaded.embedding.weight, model.embedding.weight)


@one_structure
def test_a_run_does_not_go_on_from_another_start(flow, no_curves, tmp_path):
    """Reference, samples and comparisons are made anew from --init: it must be the one the run began with."""
    runs, stages, _ = flow
    sft = shutil.copytree(runs / "sft", tmp_path / "sft")
    config = dataclasses.replace(stages[2][1], init=str(sft), out=str(tmp_path / "new"), steps=2)
    train_rm.main(config)
    shutil.copy(sft / "checkpoint-0000004.pt", sft / "checkpoint-0000006.pt")
    with pytest.raises(UserError, match="sft at step 4 of run .* -> step 6 of run "):
        train_rm.main(dataclasses.replace(config, steps=4))
    rm = shutil.copytree(runs / "rm", tmp_path / "rm")
    config = dataclasses.replace(stages[3][1], reward=str(rm), out=str(tmp_path / "ppo"), steps=1)
    train_ppo.main(config)
    settings = json.loads((rm / "config.json").read_text())                # as if trained anew with another seed
    (rm / "config.json").write_text(json.dumps(settings | {"seed": 9}))
    with pytest.raises(UserError, match="rm at step 4 of run .* -> step 4 of run "):
        train_ppo.main(dataclasses.replace(config, steps=2))
    own = tmp_path / "own.py"
    own.write_text("def reward(prompt, response): return 1.0")
    config = dataclasses.replace(config, reward=f"{own}:reward", out=str(tmp_path / "own"))
    train_ppo.main(config)
    own.write_text("def reward(prompt, response): return -5.0")
    with pytest.raises(UserError, match="own.py:reward at file .* -> file "):
        train_ppo.main(dataclasses.replace(config, steps=2))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(f'{{"prompt": "Say {n}.", "response": "It is {n}."}}\n' for n in range(40)))
    config = dataclasses.replace(stages[1][1], data=str(pairs), out=str(tmp_path / "pairs"), steps=1)
    train_sft.main(config)
    held_out = (tmp_path / "pairs" / "held_out.json").read_text()
    pairs.write_text(pairs.read_text().replace("It is", "This is"))
    with pytest.raises(UserError, match="pairs.jsonl at content .* -> content "):
        train_sft.main(dataclasses.replace(config, steps=2))
    assert (tmp_path / "pairs" / "held_out.json").read_text() == held_out


@one_structure
def test_a_second_round_ranks_what_the_tuned_policy_writes(flow, no_curves, tmp_path, monkeypatch):
    """--sampler: the samples are of the runs it names, the weights still of --init; which runs is remembered."""
    runs, stages, _ = flow
    config = dataclasses.replace(stages[2][1], sampler=f"{runs}/sft,{runs}/ppo", out=str(tmp_path / "rm"))
    asked = []
    monkeypatch.setattr(labeller, "generate_many", lambda run, model, *rest: asked.append(model)
                        or generate.generate_many(run, model, *rest))
    train_rm.main(config)
    for model, name in zip(asked, ("sft", "ppo", "sft", "ppo"), strict=True):       # training, then held out
        of_run = checkpoint.load_model(str(runs / name))
        assert all(torch.equal(x, y) for x, y in zip(model.parameters(), of_run.parameters()))
    started = json.loads((tmp_path / "rm" / "config.json").read_text())["started_from"]
    assert set(started) == {f"{runs}/sft", f"{runs}/ppo", config.data}
    with pytest.raises(UserError, match="is a reward model: it scores answers and writes none"):
        train_rm.main(dataclasses.replace(config, sampler=str(runs / "rm"), out=str(tmp_path / "none")))
    other = shutil.copytree(runs / "ppo", tmp_path / "other")
    (other / "tokenizer.tiktoken").write_text("".join((runs / "ppo" / "tokenizer.tiktoken").read_text()
                                                      .splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="other was trained on other tokens than"):
        train_rm.main(dataclasses.replace(config, sampler=str(other), out=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()


@one_structure
def test_a_stage_that_was_stopped_is_told(flow, tmp_path, capsys):
    """A model may be used before it is finished; a reward model not: its scores are normalised at the end."""
    runs, stages, _ = flow
    copies = {name: shutil.copytree(runs / name, tmp_path / name) for name in ("pretrain", "sft", "rm")}
    for folder in copies.values():
        (folder / "checkpoint-0000004.pt").unlink()
    checkpoint.load_tokenizer(str(copies["sft"]), "sft")
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"note: {copies['sft']} was stopped at step 2 of 4; to finish it: python train_sft.py --")
    words = shlex.split(said.partition("train_sft.py ")[2])                # all its settings, and where it lies now
    config = command_line.parse(train_sft.Config, words, "")
    assert config == dataclasses.replace(stages[1][1], out=str(copies["sft"]))
    assert checkpoint.open_folder(copies["sft"], config)["step"] == 2
    with pytest.raises(UserError, match="rm was stopped at step 2 of 4; finish it first: python train_rm.py"):
        train_ppo.main(dataclasses.replace(stages[3][1], reward=str(copies["rm"]), out=str(tmp_path / "ppo")))
    assert capsys.readouterr().err == ""                                   # one sentence, and no note before it
    with pytest.raises(UserError, match="rm was stopped at step 2 of 4; to end it early, steps must be at least 3"):
        train_rm.main(dataclasses.replace(stages[2][1], out=str(copies["rm"]), steps=2))


@one_structure
def test_the_report_says_what_is_missing(flow, tmp_path, capsys):
    """Without a reward model there is no reward and no best of n, without a policy no row for it, and that is
    said; stages with different tokenizers are refused.
    """
    for name in ("pretrain", "sft"):
        shutil.copytree(flow[0] / name, tmp_path / name)
    config = evaluate.Config(runs=str(tmp_path), data=flow[1][1][1].data, device="cpu", prompts=4, max_new=4)
    report = evaluate.main(config)
    assert {"base", "sft", "sft_cool", "human"} <= set(report) and not {"ppo", "best_of_n"} & set(report)
    assert "reward" not in report["sft"] and report["sft_cool"]["kl"] > 0 and report["base"]["kl"] > 0
    assert f"note: {tmp_path}/rm holds no checkpoint" in capsys.readouterr().out
    path = tmp_path / "pretrain" / "tokenizer.tiktoken"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="pretrain in .* other tokens than sft"):
        evaluate.main(config)


@one_structure
def test_a_finished_reward_model_goes_on_unnormalised(flow, no_curves, tmp_path, monkeypatch):
    """The loss is one of differences: what normalises them afterwards must not shrink them in training."""
    _, stages, _ = flow
    main, config = stages[2]
    copy, seen, step_of = shutil.copytree(config.out, tmp_path / "rm"), [], train_rm.train_step
    assert checkpoint.load_model(str(copy)).std != 1
    monkeypatch.setattr(train_rm, "train_step", lambda c, run, loaded, model, *rest: (
        seen.append(float(common.unwrap(model).std)), step_of(c, run, loaded, model, *rest))[1])
    main(dataclasses.replace(config, out=str(copy), steps=config.steps + 2))
    assert seen == [1.0, 1.0] and checkpoint.load_model(str(copy)).std != 1


@pytest.mark.parametrize("items, world, size", [(9, 2, 1), (9, 2, 2), (7, 3, 1), (4, 2, 0), (8, 2, 3), (2, 2, 1)])
def test_micro_batches_are_equally_many_and_never_empty(items, world, size):
    """Ranks wait for each other after each: one more on one of them would be waited for in vain."""
    runs = [common.Run(Path("."), torch.device("cpu"), torch.float32, rank, world) for rank in range(world)]
    ranks = [run.micro_batches(list(range(items)), size) for run in runs]
    assert len({len(parts) for parts in ranks}) == 1 and all(part for parts in ranks for part in parts)
    assert sorted(item for parts in ranks for part in parts for item in part) == list(range(items))


@one_structure
@pytest.mark.parametrize("module", [train_pretrain, train_sft, train_rm, train_dpo, train_ppo])
def test_a_reward_model_is_no_model_to_start_from(flow, module, monkeypatch, capsys, tmp_path, package):
    flags = ["--data", str(package), "--init", str(flow[0] / "rm"), "--out", str(tmp_path / "out")]
    flags += ["--batch_size", "4", "--context", "64"] + ["--max_new", "8"] * hasattr(module.Config, "max_new")
    flags += ["--reward", str(flow[0] / "rm"), "--minibatch_size", "4"] * (module is train_ppo)
    error = fails(monkeypatch, capsys, module, *flags)
    assert "is a reward model" in error and not (tmp_path / "out").exists()


@one_structure
@pytest.mark.parametrize("stage", range(4))
def test_micro_batches_make_the_same_step(flow, stage, no_curves, tmp_path):
    """One forward pass or several: every loss is divided by what the whole step counts."""
    main, config = flow[1][stage]
    whole, parts = (main(dataclasses.replace(config, steps=1, out=str(tmp_path / str(size)), micro_batch_size=size))
                    for size in (0, 2))
    compared = {"train_loss", "grad_norm", "counted", "policy_loss", "value_loss", "ptx_loss", "loss"} & set(whole)
    assert compared
    for name in compared:
        assert whole[name] == pytest.approx(parts[name], rel=1e-3, abs=1e-5), name


def test_generate_answers_from_a_run(flow, capsys):
    """The command line's main gives as many answers as asked for."""
    runs, _, _ = flow
    answers = generate.main(generate.Config(run=str(runs / "ppo"), prompt="def read_area(width):", samples=3,
                                            max_new=8, device="cpu"))
    assert len(answers) == 3 and capsys.readouterr().out.count("\n") >= 3
    asked = generate.Config(run=str(runs / "ppo"), prompt="def read_area(width):", beams=2, max_new=8, device="cpu")
    assert len(generate.main(asked)) == 1
    with pytest.raises(UserError, match="one answer to a prompt and draws nothing: leave out samples"):
        generate.main(dataclasses.replace(asked, samples=3))


@one_structure
def test_temperature_top_k_and_top_p_reach_the_draw(flow, monkeypatch):
    seen = []
    monkeypatch.setattr(generate, "next_tokens", lambda logits_BV, *settings: (
        seen.append(settings[:3]), logits_BV.argmax(-1))[1])
    generate.main(generate.Config(run=str(flow[0] / "sft"), prompt="a", max_new=1, temperature=0.7, top_k=3,
                                  top_p=0.9, device="cpu"))
    assert seen == [(0.7, 3, 0.9)]


@one_structure
def test_a_prompt_longer_than_any_in_training_is_noted(flow, tmp_path, capsys):
    """Counted with what stands around it."""
    folder = shutil.copytree(flow[0] / "sft", tmp_path / "sft")
    settings = json.loads((folder / "config.json").read_text())
    tokenizer = checkpoint.load_tokenizer(str(folder), "sft")
    n = len(tokenizer.encode("a b c")) + tokenizer.around
    for context, noted in ((n, False), (n - 1, True)):
        (folder / "config.json").write_text(json.dumps(settings | {"context": context}))
        generate.main(generate.Config(run=str(folder), prompt="a b c", max_new=1, device="cpu"))
        assert (f"{n} tokens are more than {folder} has ever read, {n - 1}" in capsys.readouterr().err) == noted


# ---- families --------------------------------------------------------------------------------------------

OWN_OBJECTIVE = {"gpt2": "next_token", "llama2-70b": "next_token", "baichuan-13b": "next_token",
                 "falcon-7b": "next_token", "falcon-40b": "next_token", "palm-8b": "next_token",
                 "u-palm-540b": "u_palm", "chatglm-6b": "glm_10b", "chatglm2-6b": "glm_130b",
                 "glm-130b": "glm_130b", "t5-small": "span_corruption", "flan-t5-small": "prefix_lm",
                 "bart-base": "bart"}


def loss_of_words(folder: Path, config: train_pretrain.Config) -> tuple[float, float]:
    """Nats per held-out target token that is no special one (sentinels are easily foreseen), and the entropy of
    how often such tokens occur.
    """
    run = common.Run(folder, torch.device("cpu"), torch.float32)
    loaded, model = train_pretrain.load_data(config, run), checkpoint.load_model(str(folder))
    batch = data.lay_out(loaded.held_out[:64], model.config.structure, config.row, loaded.tokenizer)
    with torch.no_grad():
        logits_NV = model(batch, masks.of_batch(model.config.structure, batch), batch.loss_mask)
    targets_N = batch.targets[batch.loss_mask]
    words_N = torch.isin(targets_N, torch.tensor(list(loaded.tokenizer.text)))
    counts = torch.bincount(torch.tensor(sum(loaded.train, [])), minlength=loaded.tokenizer.vocab).float()
    loss = float(-objectives.token_logprobs(logits_NV, targets_N)[words_N].mean())
    return loss, torch.special.entr(counts / counts.sum()).sum().item()


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("preset, objective", OWN_OBJECTIVE.items())
def test_every_family_learns_by_its_own_objective(preset, objective, package, tmp_path):
    """Scaled down, each family goes through all stages, and learns more than how often tokens occur."""
    stages = stage_configs("causal", package, tmp_path)
    sizes = dict(preset=preset, structure="", objective=objective, layers=2, heads=4, width=32, lr=1e-2,
                 steps={"span_corruption": 300, "u_palm": 60, "glm_130b": 60}.get(objective, 40), eval_every=0,
                 save_every=0)
    pretrain, config = stages[0]
    pretrain(type(config)(**{**vars(config), **sizes}))
    loss, entropy = loss_of_words(tmp_path / "pretrain", type(config)(**{**vars(config), **sizes}))
    assert loss < 0.8 * entropy
    for main, config in stages[1:]:
        main(type(config)(**{**vars(config), "steps": 1, "eval_every": 0, "save_every": 0}))


def test_speed_is_measured_for_every_structure(capsys):
    """bench.py prints one line with the figures that other programs print too."""
    for what, structure in (("train", "causal"), ("train", "encdec"), ("generate", "prefix")):
        bench.main(bench.Config(what=what, structure=structure, layers=1, heads=2, kv_heads=1, width=16,
                                context=32, source=8 if structure == "encdec" else 0, batch_size=2, prompt=4,
                                new=3, repetitions=2, device="cpu"))
        record = json.loads(capsys.readouterr().out)
        assert record["tokens_per_s"] > 0 and record["ms_p10"] <= record["ms_median"] <= record["ms_p90"]


# ---- ranks -------------------------------------------------------------------------------------------------

def greedy(model, prompts, tokenizer, max_new, *arguments, **options):
    """Instead of sampling: the same answers on any number of ranks."""
    return generate.generate(model, prompts, tokenizer, max_new, temperature=0.0)


DRIVER = """
import sys
sys.path.insert(0, {tests!r})
import conftest, common, test_stages, train_ppo   # conftest first: it says where the rest lies
from pathlib import Path
common.CACHE = Path({cache!r})
train_ppo.generate = test_stages.greedy
for main, config in test_stages.stage_configs("causal", Path({package!r}), Path({runs!r})):
    main(config)
import torch.distributed as dist
dist.destroy_process_group()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="gloo under torchrun is tested on Linux and macOS")
@one_structure
def test_two_ranks_equal_one(flow, package, no_curves, tmp_path, monkeypatch):
    """With the same global batch two ranks log the same losses, gradients and PPO figures as one process."""
    runs, stages, _ = flow
    monkeypatch.setattr(train_ppo, "generate", greedy)
    main, config = stages[3]
    main(type(config)(**{**vars(config), "out": str(tmp_path / "one" / "ppo")}))
    (tmp_path / "driver.py").write_text(DRIVER.format(
        tests=str(ROOT / "tests"), cache=str(tmp_path / "cache"), package=str(package),
        runs=str(tmp_path / "two")))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    str(tmp_path / "driver.py")], check=True, timeout=240,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    for stage in ("pretrain", "sft", "rm", "ppo", "dpo"):
        alone = tmp_path / "one" if stage == "ppo" else runs
        ones, twos = ([json.loads(line) for line in (where / stage / "metrics.jsonl").read_text().splitlines()]
                      for where in (alone, tmp_path / "two"))
        for one, two in zip(ones, twos, strict=True):
            for name in set(one) - {"seconds", "padding"}:
                assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-5), (stage, one["step"], name)


def a_layer_takes(monkeypatch, seconds) -> None:
    """Timings as told by seconds(dtype, device, threads), and none remembered from before or for later."""
    monkeypatch.setattr(hardware, "seconds_of_a_layer", seconds)
    monkeypatch.setattr(hardware, "seconds_in_turns", functools.cache(hardware.seconds_in_turns.__wrapped__))


@pytest.mark.parametrize("module, cores, expected", [(train_pretrain, 2, 2), (train_pretrain, 64, 4),
                                                     (train_ppo, 64, 16), (train_sft, 3, 2), (train_rm, 1, 1)])
def test_ranks_are_taken_where_threads_wait_for_each_other(module, cores, expected, monkeypatch, tmp_path):
    """As many as have an equal share of every batch; one where threads are nearly as good; as before where a run
    goes on.
    """
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(hardware, "cores", lambda: cores)
    config = module.Config(device="cpu", out=str(tmp_path))
    for seconds_of_many, ranks in ((0.9 / expected, 1), (1.0, expected)):
        a_layer_takes(monkeypatch, lambda dtype, device, threads: 1.0 if threads == 1 else seconds_of_many)
        assert hardware.choose_ranks(config) == ranks
    if module is train_ppo:                   # of 64 answers, 32 to a prompt, two ranks can have equal shares
        assert hardware.choose_ranks(module.Config(device="cpu", out=str(tmp_path), batch_size=64, samples=32)) == 2
        assert hardware.choose_ranks(module.Config(device="cpu", out=str(tmp_path), minibatch_size=4)) == 1    # a prompt's
    (tmp_path / "checkpoint-0000001.pt").touch()
    for before, ranks in ((1, 1), (7, expected)):         # 7 do not share the step: that run had other settings
        (tmp_path / "config.json").write_text(f'{{"ranks": {before}}}')
        assert hardware.choose_ranks(config) == ranks
    with pytest.raises(UserError, match="ranks is -1"):
        hardware.choose_ranks(module.Config(device="cpu", ranks=-1))
    assert hardware.choose_ranks(module.Config(device="cpu", ranks=2)) == 2
    with pytest.raises(UserError, match="ranks is 3; to share every step equally it must divide"):
        hardware.choose_ranks(module.Config(device="cpu", ranks=3))


def test_a_run_that_begins_anew_asks_no_earlier_one(tmp_path):
    (tmp_path / "config.json").write_text('{"ranks": 3}')
    assert hardware.recorded(train_sft.Config(out=str(tmp_path))) == {}                 # stopped before it had saved
    (tmp_path / "checkpoint-0000001.pt").touch()
    found = [hardware.recorded(train_sft.Config(out=str(tmp_path), resume=resume))
             for resume in ("auto", "must", "never")]
    assert found == [{"ranks": 3}, {"ranks": 3}, {}]


def test_threads_are_those_of_this_machine(monkeypatch):
    """Under torchrun on two machines the ranks of one share its cores, not those of all."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(hardware, "cores", lambda: 16)
    for local, threads in ((None, 2), ("4", 4)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local) if local else monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        assert hardware.choose_threads(torch.device("cpu"), 8, before=99) == threads == torch.get_num_threads()


@pytest.mark.parametrize("seconds_of_one, threads", [(0.97, 4), (0.9, 1)])
def test_threads_that_are_nearly_as_fast_stay(seconds_of_one, threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(hardware, "cores", lambda: 4)
    a_layer_takes(monkeypatch, lambda dtype, device, n: seconds_of_one if n == 1 else 1.0)
    assert hardware.choose_threads(torch.device("cpu"), 1) == threads


def test_one_disturbed_timing_decides_nothing(monkeypatch):
    """Format and threads are timed in turns; what is much slower is timed once."""
    timed = []

    def seconds(dtype, device, threads):
        timed.append(dtype)
        return {torch.float32: 1.0, torch.bfloat16: 0.6}[dtype] * (2.0 if len(timed) == 2 else 1.0)
    a_layer_takes(monkeypatch, seconds)
    assert hardware.choose_dtype("auto", torch.device("cpu"))[0] == torch.bfloat16 and len(timed) == 6
    a_layer_takes(monkeypatch,
                  lambda dtype, device, threads: timed.append(dtype) or (9.0 if len(timed) % 2 else 1.0))
    timed.clear()
    for _ in range(2):                                                      # and nothing is timed twice
        assert hardware.choose_dtype("auto", torch.device("cpu"))[0] == torch.bfloat16 and len(timed) == 2


@one_structure
def test_a_run_goes_on_with_its_threads(flow, monkeypatch):
    """With others a sum may end in other bits."""
    assert json.loads((flow[0] / "sft" / "config.json").read_text())["threads"] == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(hardware, "cores", lambda: 4)
    a_layer_takes(monkeypatch, lambda dtype, device, threads: 1.0 / threads)
    chosen = [hardware.choose_threads(torch.device("cpu"), world, before) for world, before in
              ((1, 0), (2, 0), (1, 3), (1, 9), (4, 0))]
    assert chosen == [4, 2, 3, 4, 1]
    monkeypatch.setattr(common.Run, "gather", lambda run, mine: [mine, 2])              # another rank has measured 2
    common.set_up(train_sft.Config(out="none", dtype="fp32", device="cpu"))
    assert torch.get_num_threads() == 2


def script(*flags: str) -> subprocess.CompletedProcess:
    """A script run as a user runs it."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run([sys.executable, *flags], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=240)


@pytest.mark.skipif(sys.platform == "win32", reason="gloo is tested on Linux and macOS")
def test_a_script_starts_its_own_ranks(package, tmp_path):
    """--ranks 2 is two processes and one voice: a run that ends well, and a mistake told once, exit code 2."""
    flags = ("train_pretrain.py", "--ranks", "2", "--data", str(package), "--steps", "2", "--vocab", "420",
             "--layers", "1", "--width", "32", "--context", "64", "--device", "cpu", "--dtype", "fp32")
    run = script(*flags, "--out", str(tmp_path / "out"))
    assert run.returncode == 0 and json.loads((tmp_path / "out" / "config.json").read_text())["ranks"] == 2
    assert run.stdout.count("done in") == 1 and "2 rank(s)" in run.stdout
    run = script(*flags, "--out", str(tmp_path / "wrong"), "--heads", "3")
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert not (tmp_path / "wrong").exists()


# ---- bad input ---------------------------------------------------------------------------------------------

def fails(monkeypatch, capsys, module, *flags: str) -> str:
    """Run a script with these flags; it must exit with 2 and one sentence on stderr, which is returned."""
    measured = ("--ranks", "1", "--dtype", "fp32") if hasattr(module.Config, "ranks") else ()    # said, not timed
    monkeypatch.setattr(sys, "argv", ["script.py", *measured, *flags])
    with pytest.raises(SystemExit) as exit_info:
        command_line.run(module.main, module.Config, module.__doc__)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_unknown_flag_names_the_nearest(monkeypatch, capsys):
    assert "--batch_size" in fails(monkeypatch, capsys, train_sft, "--batchsize", "3")


@one_structure
@pytest.mark.parametrize("content, fragment", [
    (b"", "empty"),
    (b"\n\n", "empty"),
    (b"\xff\xfe\x00a", "UTF-8"),
    (b'{"prompt": "a", "response": "b"}\n{"prompt": \n', "d.jsonl:2"),
    (b'{"question": "a", "answer": "b"}\n', "found question, answer"),
    (b'{"prompt": "a", "response": 3}\n', "'response'"),
    (b'{"text": "a"}\n', "prompt + response"),
    (b'[1, 2]\n', "d.jsonl:1"),
    (b'{"prompt": "a", "response": "b"}\n{"prompt": "\\ud83d", "response": "b"}\n', "d.jsonl:2: 'prompt' holds half"),
    (b'{"prompt": ' + b"9" * 5000 + b"}", "d.jsonl:1: not read"),
    (b'[' * 100_000, "d.jsonl:1: not read"),
])
def test_bad_files_are_one_sentence(monkeypatch, capsys, tmp_path, flow, content, fragment):
    """A file that cannot be used is named with its line and what was expected; nothing is written."""
    runs, _, _ = flow
    (tmp_path / "d.jsonl").write_bytes(content)
    error = fails(monkeypatch, capsys, train_sft, "--data", str(tmp_path / "d.jsonl"),
                  "--init", str(runs / "pretrain"), "--out", str(tmp_path / "out"))
    assert fragment in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, fragment", [
    (("--data", "missing.txt"), "no such file"),
    (("--heads", "3"), "heads 3"),
    (("--kv_heads", "3"), "kv_heads 3"),
    (("--structure", "circle"), "circle"),
    (("--objective", "guess"), "guess"),
    (("--vocab", "100"), "vocab 100"),
    (("--steps", "0"), "steps"),
    (("--seed", "99999999999999999999"), "seed"),
    (("--source_weight", "-1"), "source_weight"),
    (("--steps", "many"), "many"),
    (("--batch_size", "100000"), "lower"),
    (("--resume", "must"), "resume"),
    (("--resume", "perhaps"), "perhaps"),
    (("--dtype", "fp7"), "fp7"),
    (("--device", "abacus"), "abacus"),
])
def test_bad_flags_are_one_sentence(monkeypatch, capsys, tmp_path, package, flags, fragment):
    """Flags that cannot be satisfied are refused before anything is written."""
    flags = ((() if "--data" in flags else ("--data", str(package)))
             + ("--vocab", "420") * ("--vocab" not in flags) + flags)
    assert fragment in fails(monkeypatch, capsys, train_pretrain, "--out", str(tmp_path / "out"), *flags)
    assert not (tmp_path / "out").exists()


def test_a_slip_of_the_pen_is_found_before_the_text_is_read(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(corpus, "load_records", None)
    for flags, fragment in ((("--heads", "3"), "heads 3"), (("--objective", "guess"), "guess"),
                            (("--preset", "gpt5"), "gpt5"), (("--lr", "nan"), "lr is nan"),
                            (("--lr", "inf"), "lr is inf; it must be at least 0, and finite"), (("--out", ""), "out is empty")):
        assert fragment in fails(monkeypatch, capsys, train_pretrain, "--out", str(tmp_path / "out"), *flags)
    for flags, fragment in ((("--answers", "10"), "answers is 10"), (("--mismatched", "-1"), "mismatched is -1")):
        assert fragment in fails(monkeypatch, capsys, train_rm, "--out", str(tmp_path / "out"), *flags)


def test_an_out_that_is_a_file_is_one_sentence(monkeypatch, capsys, tmp_path, package):
    """Said before anything is read; so is a folder below a file, and a name that no disk takes."""
    (tmp_path / "out").write_text("")
    for out, reason in ((tmp_path / "out", "no folder"), (tmp_path / "out" / "x", "no folder"), (tmp_path / ("x" * 300), "too long")):
        error = fails(monkeypatch, capsys, train_pretrain, "--data", str(package), "--vocab", "420", "--out", str(out))
        assert str(out) in error and reason in error


def test_a_full_disk_is_one_sentence(monkeypatch, tmp_path):
    """torch.save makes a RuntimeError of it; the checkpoint before stays."""
    run = common.Run(tmp_path, torch.device("cpu"), torch.float32)
    config = train_sft.Config()
    checkpoint.save(run, 1, config, networks.ModelConfig("causal", 9, 1, 1, 1, width=8))

    class Full(io.BytesIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoint, "replacing", lambda path: contextlib.nullcontext(Full()))
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(run, 2, config, networks.ModelConfig("causal", 9, 1, 1, 1, width=8))
    assert checkpoint.steps_of(tmp_path) == [1]


def test_output_that_nobody_reads_is_no_success(monkeypatch):
    """As of a program that SIGPIPE ends."""
    def cut(config):
        raise BrokenPipeError
    monkeypatch.setattr(sys, "argv", ["train_sft.py", "--ranks", "1"])
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    with pytest.raises(SystemExit) as stopped:
        command_line.run(cut, train_sft.Config, "")
    assert stopped.value.code == 141


def test_dpo_without_a_reference_is_one_sentence(monkeypatch, capsys, tmp_path):
    """At beta 0 every policy would do: refused before anything is read."""
    assert "beta" in fails(monkeypatch, capsys, train_dpo, "--beta", "0", "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module, flags, fragment", [
    (bench, ("--batch_size", "0"), "batch_size is 0"), (bench, ("--what", "generate", "--prompt", "-4"), "prompt is -4"),
    (bench, ("--source", "-4"), "source is -4"), (generate, ("--temperature", "inf"), "temperature is inf"),
    (generate, ("--seed", "-1"), "seed is -1"), (generate, ("--prompt", "a", "--prompts", "b.txt"), "both given"),
    (generate, ("--prompts", __file__), "must be .jsonl or text"),
    (generate, ("--beams", "2", "--samples", "2", "--top_k", "3"), "leave out samples, top_k")])
def test_the_other_scripts_check_before_they_begin(module, flags, fragment, monkeypatch, capsys):
    assert fragment in fails(monkeypatch, capsys, module, *flags)


@pytest.mark.parametrize("error, memory", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), "GPU's memory"), (MemoryError(), "memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), "memory")])
def test_full_memory_is_one_sentence(error, memory, monkeypatch, capsys):
    """On the rank that meets it, since the others do not."""
    def full(config):
        raise error
    monkeypatch.setattr(sys, "argv", ["train_sft.py", "--ranks", "1"])
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as stopped:
        command_line.run(full, train_sft.Config, "")
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and f"the {memory} is full on rank 3; a smaller --micro_batch_size" in said
    assert said.count("\n") == 1


def test_a_cuda_device_beyond_the_last_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert hardware.choose_device("cuda:1").index == 1 and chosen == [torch.device("cuda:1")]
    with pytest.raises(UserError, match="cuda:2.* is not present"):
        hardware.choose_device("cuda:2")


@one_structure
def test_the_command_to_run_first_finds_what_lies_beside(flow):
    runs, _, _ = flow
    assert checkpoint.command_for("sft", "runs/sft") == "python train_sft.py"
    assert checkpoint.command_for("sft", "runs/tiny/sft") == "python train_sft.py --tiny"
    assert checkpoint.command_for("sft", "runs/sft", tiny=True) == "python train_sft.py --tiny --out runs/sft"
    assert (checkpoint.command_for("ppo", f"{runs}/other")
            == f"python train_ppo.py --init {runs}/sft --reward {runs}/rm --out {runs}/other")


@pytest.mark.parametrize("module", [train_pretrain, train_sft, train_rm, train_ppo, train_dpo, evaluate])
def test_tiny_is_small_and_leaves_what_was_asked_for(module):
    """--tiny sets fields that exist, of sizes at most the usual, and none that was given."""
    usual, tiny = module.Config(), module.Config(tiny=True)
    common.apply_tiny(tiny)
    sizes = [name for name, value in module.Config.TINY.items() if isinstance(value, int)]
    assert {"steps", "prompts"} & set(sizes) and set(module.Config.TINY) <= set(vars(usual))
    assert all(getattr(tiny, name) <= getattr(usual, name) for name in sizes)
    given = module.Config(tiny=True, **{sizes[0]: 7})
    common.apply_tiny(given)
    assert getattr(given, sizes[0]) == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_absent_cuda_is_one_sentence(monkeypatch, capsys, tmp_path):
    assert "not present" in fails(monkeypatch, capsys, train_pretrain, "--device", "cuda",
                                  "--out", str(tmp_path / "out"))


@pytest.mark.parametrize("module, needed", [(train_sft, "train_pretrain.py"), (train_rm, "train_sft.py"),
                                            (train_ppo, "train_sft.py"), (train_dpo, "train_sft.py"),
                                            (evaluate, "train_pretrain.py")])
def test_a_stage_names_the_one_it_needs(monkeypatch, capsys, tmp_path, module, needed):
    flag = "--runs" if module is evaluate else "--init"
    out = () if module is evaluate else ("--out", str(tmp_path / "out"))
    assert needed in fails(monkeypatch, capsys, module, flag, str(tmp_path / "nowhere"), *out)


@one_structure
def test_prompts_without_room_are_dropped_or_refused(monkeypatch, capsys, tmp_path, flow):
    """Prompts that leave no room for an answer are dropped and counted; if that is all of them, the run is
    refused.
    """
    runs, _, _ = flow
    long_prompt = json.dumps({"prompt": "word " * 500})
    (tmp_path / "p.jsonl").write_text(f"{long_prompt}\n" * 3)
    error = fails(monkeypatch, capsys, train_ppo, "--data", str(tmp_path / "p.jsonl"),
                  "--init", str(runs / "sft"), "--reward", str(runs / "rm"), "--out", str(tmp_path / "out"))
    assert "prompts" in error and not (tmp_path / "out").exists()


@one_structure
def test_another_configuration_does_not_touch_a_run(monkeypatch, capsys, flow):
    """A folder that holds a run with other settings, of those that decide the weights, is refused, and what
    differs is named.
    """
    _, stages, _ = flow
    config = stages[1][1]
    before = sorted(path.name for path in Path(config.out).iterdir())
    error = fails(monkeypatch, capsys, train_sft, "--data", config.data, "--init", config.init,
                  "--out", config.out, "--lr", "0.5")
    assert f"{config.out} holds a run with other settings (" in error and "lr " in error
    for name, value in (("seed", 9), ("lr", 9.0), ("batch_size", 9), ("context", 99), ("warmup", 9)):
        with pytest.raises(UserError, match=rf"other settings \({name} \S+ -> {value}\)"):
            checkpoint.open_folder(Path(config.out), dataclasses.replace(config, **{name: value}))
    for free in ({"steps": config.steps + 1}, {"micro_batch_size": 1}):          # what a full GPU is told to try
        assert checkpoint.open_folder(Path(config.out), dataclasses.replace(config, **free))["step"] == 4
    assert sorted(path.name for path in Path(config.out).iterdir()) == before


@one_structure
def test_a_finished_run_is_left_as_it_is(flow, capsys):
    """The same command again says that nothing is left to do, and returns the last line of the log."""
    _, stages, last = flow
    for (main, config), row in zip(stages, last):
        before = {path.name: path.stat().st_mtime_ns for path in Path(config.out).iterdir()}
        with open(Path(config.out) / "metrics.jsonl", "a") as log:         # the power went while this was written
            log.write('{"step": 5, "lo')
        before["metrics.jsonl"] = (Path(config.out) / "metrics.jsonl").stat().st_mtime_ns
        assert main(config) == row and "finished already" in capsys.readouterr().out
        assert before == {path.name: path.stat().st_mtime_ns for path in Path(config.out).iterdir()}


@one_structure
def test_bad_input_with_overwrite_loses_nothing(monkeypatch, capsys, flow):
    """--overwrite removes the old run only when the new one can begin."""
    _, stages, _ = flow
    config = stages[1][1]
    before = sorted(path.name for path in Path(config.out).iterdir())
    fails(monkeypatch, capsys, train_sft, "--data", "missing.jsonl", "--init", config.init, "--out", config.out,
          "--overwrite")
    message = fails(monkeypatch, capsys, train_sft, "--data", config.data, "--init", config.out, "--out", config.out,
                    "--overwrite")
    assert "where this run starts" in message
    assert sorted(path.name for path in Path(config.out).iterdir()) == before


@one_structure
def test_overwrite_begins_anew(flow, tmp_path, monkeypatch):
    """--overwrite replaces a run made with other settings; no old checkpoint, curves or samples survive."""
    _, stages, _ = flow
    main, config = stages[1]
    folder = tmp_path / "old"
    shutil.copytree(config.out, folder)
    config, seen = dataclasses.replace(config, out=str(folder), steps=3, lr=1e-4, overwrite=True), []
    monkeypatch.setattr(common.Log, "line", lambda log, step, **figures: seen.append({p.name for p in folder.iterdir()}))
    main(config)
    assert checkpoint.steps_of(folder) == [2, 3] and not {"curves.png", "samples.txt"} & seen[0]


def test_a_loss_that_is_not_finite_stops_before_the_step(monkeypatch, package, tmp_path):
    """NaN: the run ends with a fault before the optimizer step, and the last good checkpoint is still
    there.
    """
    main, config = stage_configs("causal", package, tmp_path)[0]
    real, calls = train_pretrain.objectives.language_model_loss, []

    def poisoned(*arguments):
        calls.append(1)
        loss = real(*arguments)
        return loss * float("nan") if len(calls) > 3 and loss.requires_grad else loss
    monkeypatch.setattr(train_pretrain.objectives, "language_model_loss", poisoned)
    with pytest.raises(common.Fault, match="not a finite number"):
        main(config)
    state = checkpoint.latest(Path(config.out))
    assert state["step"] == 2 and all(torch.isfinite(t).all() for t in state["model"].values())


@one_structure
@pytest.mark.parametrize("left", [1000, 0])
def test_a_damaged_checkpoint_is_passed_over(flow, tmp_path, capsys, left):
    """A truncated file is said, and the checkpoint before it is used; where none is left, nothing begins anew unasked."""
    _, stages, _ = flow
    folder = tmp_path / "damaged"
    shutil.copytree(stages[1][1].out, folder)
    newest = folder / "checkpoint-0000004.pt"
    newest.write_bytes(newest.read_bytes()[:left])
    assert checkpoint.latest(folder)["step"] == 2 and "cannot be read" in capsys.readouterr().out
    for content in (b"hello", pickle.dumps(folder, protocol=2)):
        newest.write_bytes(content)
        assert checkpoint.latest(folder)["step"] == 2 and "cannot be read (it is no checkpoint)" in capsys.readouterr().out
    whole = (folder / "checkpoint-0000002.pt").read_bytes()
    at = len(whole) // 2                                                   # one bit, in the middle of some weights
    newest.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    assert checkpoint.latest(folder)["step"] == 2 and "has changed since it was written" in capsys.readouterr().out
    (folder / "checkpoint-0000002.pt").write_bytes(b"")
    config = type(stages[1][1])(**{**vars(stages[1][1]), "out": str(folder)})
    with pytest.raises(UserError, match="none of which can be read"):
        checkpoint.open_folder(folder, config)
    config.overwrite = True
    assert checkpoint.open_folder(folder, config) is None


@one_structure
@pytest.mark.parametrize("name, main", [
    ("held_out.json", lambda runs: evaluate.main(evaluate.Config(runs=str(runs), device="cpu"))),
    ("config.json", lambda runs: generate.main(generate.Config(run=str(runs / "sft"), prompt="def area(width):"))),
])
def test_a_spoilt_file_of_a_run_is_a_sentence(flow, tmp_path, name, main):
    for stage in ("pretrain", "sft"):
        shutil.copytree(flow[0] / stage, tmp_path / stage)
    (tmp_path / "sft" / name).write_text('{"context": 12')
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        main(tmp_path)

"""Prose and structure: what the README says runs, the scripts are siblings, every flag is read, files stay
readable.
"""
import ast
import dataclasses
import difflib
import inspect
import json
import re
from pathlib import Path

import pytest

import bench
import checkpoint
import common
import data
import evaluate
import generate
import hardware
import labeller
import presets
import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft

ROOT = Path(__file__).parent.parent
STAGES = (train_pretrain, train_sft, train_rm, train_ppo, train_dpo)
BANNERS = ("config", "set-up", "data", "model", "optimizer", "evaluate", "train", "log", "save")


def lines_of(module) -> list[str]:
    return [line for line in inspect.getsource(module).splitlines() if line.strip()]


@pytest.mark.parametrize("module", STAGES)
def test_the_nine_banners_in_order(module):
    found = re.findall(r"^# ---- (\d)\. ([\w-]+) -+$", inspect.getsource(module), re.MULTILINE)
    assert found == [(str(i), name) for i, name in enumerate(BANNERS, start=1)]


@pytest.mark.parametrize("earlier, later, share", [(train_pretrain, train_sft, 0.85),
                                                   (train_sft, train_rm, 0.75), (train_rm, train_ppo, 0.45),
                                                   (train_rm, train_dpo, 0.7)])
def test_the_stages_are_siblings(earlier, later, share):
    """Lines in common and in order, as a share of the shorter script's lines."""
    a, b = lines_of(earlier), lines_of(later)
    matched = sum(block.size for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
    assert matched / min(len(a), len(b)) >= share


@pytest.mark.parametrize("module", (*STAGES, bench, evaluate, generate))
def test_every_field_is_read_and_explained(module):
    """A flag that nothing reads is a lie; a flag without a comment has no help."""
    readers = (module, checkpoint, common, data, hardware, labeller)        # what it hands its Config to
    program = "".join(map(inspect.getsource, readers))
    source = inspect.getsource(module.Config)
    for field in dataclasses.fields(module.Config):
        assert re.search(rf"config\.{field.name}\b", program), field.name
        assert re.search(rf"^    {field.name}: .*#\s*\S", source, re.MULTILINE), field.name


def test_the_readmes_commands_exist():
    """Every python command of the README names a file and flags that are there."""
    text = (ROOT / "README.md").read_text()
    modules = {f"{module.__name__}.py": module for module in (*STAGES, bench, evaluate, generate)}
    commands = re.findall(r"(?:python|torchrun --nproc_per_node \d+) (\w+\.py)((?: --?\w+(?: (?!&&)[^-\s`&][^\s`]*)?)*)", text)
    assert len(commands) >= 8
    for script, flags in commands:
        assert (ROOT / script).exists(), script
        if script in modules:
            names = {field.name for field in dataclasses.fields(modules[script].Config)}
            assert set(re.findall(r"--(\w+)", flags)) <= names | {"help"}, (script, flags)


def test_the_readmes_results_are_the_records():
    """The README's table and figures are those of the recorded run."""
    text, report = (ROOT / "README.md").read_text(), json.loads((ROOT / "records" / "report.json").read_text())
    shown = ("gold", "gold_low", "gold_high", "gold_greedy", "about", "about_greedy", "win_human", "kl",
             "entropy", "loss", "length")
    assert evaluate.as_table(report, shown) in text
    assert f"{report['base']['bits_per_byte']:.3f} bits per byte" in text
    assert f"{report['reward_model']['accuracy']:.1%}".replace("%", " %") in text
    assert report["processor"] in text and report["versions"]["torch"] in text


@pytest.mark.parametrize("name", ["report", "report_bf16", "report_slow"])
def test_the_readmes_runs_are_the_records(name):
    """The seconds and the results of every recorded run of the first command."""
    text, report = (ROOT / "README.md").read_text(), json.loads((ROOT / "records" / f"{name}.json").read_text())
    sft, ppo = report["sft"], report["ppo"]
    cells = [f"{report['base']['bits_per_byte']:.3f}", f"{100 * report['reward_model']['accuracy']:.1f} %",
             *(f"{sft[figure]:.3f} → {ppo[figure]:.3f}" for figure in ("gold", "gold_greedy", "about_greedy")),
             f"{ppo['kl']:.1f}"]
    assert f"(records/{name}.json) | {' | '.join(cells)} |" in text
    assert f" | {' | '.join(f'{seconds:.0f}' for seconds in report['seconds'].values())} | " in text


def test_the_readmes_families_are_the_presets():
    """The table of what differs between the families is the one that presets.py makes."""
    assert presets.table() in (ROOT / "README.md").read_text()


def test_the_readme_names_every_objective(tokenizer):
    """Every --objective stands in the README's table."""
    text = (ROOT / "README.md").read_text()
    with pytest.raises(ValueError) as error:
        data.objective_of("?", tokenizer, 64)
    names = str(error.value).split("one of ")[1].split(", ")
    assert len(names) > 10 and all(f"`{name}`" in text for name in names)


def test_imports_point_one_way():
    """objectives calls no model, the model knows no data and no loss, nothing but tests imports a stage."""
    imports = {path.stem: set(re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE)) for path in ROOT.glob("*.py")}
    ours = set(imports)
    stages = {module.__name__ for module in STAGES}
    assert imports["masks"] & ours == set() and imports["objectives"] & ours == set()
    assert imports["presets"] & ours <= {"errors"} and imports["positions"] & ours <= {"masks", "presets"}
    assert imports["model"] & ours <= {"masks", "positions", "presets"}
    assert all(not imported & stages for imported in imports.values())


def test_lines_and_functions_stay_short():
    """Lines up to 110 characters, functions up to 60 lines."""
    for path in ROOT.glob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert len(line) <= 110, f"{path.name}:{number}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (path.name, node.name)

"""The notebooks run from top to bottom, hidden answers included, and teach with our own functions."""
import ast
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import claims

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
MACHINE = re.compile(r"(?<![\w.~])/(?:home|root|tmp|usr|opt|var|work|mnt|Users)/|\b[A-Z]:\\")

UNANSWERED = """
answer = ...
try:
    exec({test!r})
except Exception:
    pass
else:
    raise AssertionError("this test passes without an answer:\\n" + {test!r})
"""


def cells(path: Path, kind: str) -> list:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


def hidden_answers(markdown: str) -> list[tuple[str, str]]:
    """(answer, test) of every <details> of a cell."""
    return [tuple(re.findall(r"```python\n(.*?)```", block, re.DOTALL))
            for block in re.findall(r"<details>(.*?)</details>", markdown, re.DOTALL)]


def with_answers(path: Path) -> nbformat.NotebookNode:
    """The notebook as a reader works through it: each test is tried without an answer, then with it."""
    notebook, worked = nbformat.read(path, 4), []
    for cell in notebook.cells:
        worked.append(cell)
        for answer, test in hidden_answers(cell.source) if cell.cell_type == "markdown" else []:
            worked += [nbformat.v4.new_code_cell(UNANSWERED.format(test=test)),
                       nbformat.v4.new_code_cell(answer + test)]
    notebook.cells = worked
    return notebook


def test_there_are_notebooks():
    assert NOTEBOOKS


@every_notebook
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    """With short loops, in a copy: nothing is written into the repository. Any exception fails."""
    monkeypatch.setenv("SHORT", "1")
    for variable in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path / "jupyter"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    folder = shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copytree(ROOT / "records", tmp_path / "records")
    NotebookClient(with_answers(path), timeout=120, resources={"metadata": {"path": str(folder)}}).execute()


@every_notebook
def test_saved_outputs_are_those_of_one_clean_run(path):
    """Run from top to bottom, without errors or warnings; small, without names of folders."""
    assert path.stat().st_size < 1e6
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert all(not cell.metadata for cell in nbformat.read(path, 4).cells)
    for output in outputs:
        output.get("data", {}).pop("image/png", None)
    text = json.dumps([outputs, [cell.source for cell in nbformat.read(path, 4).cells]])
    assert not MACHINE.search(text), MACHINE.search(text)


@every_notebook
def test_the_sources_that_are_shown_are_todays(path):
    """print(inspect.getsource(file.function)): what is saved with the notebook stands in the file."""
    for cell in cells(path, "code"):
        shown = "".join(output.get("text", "") for output in cell.outputs)
        for file, name in re.findall(r"^print\(inspect.getsource\((\w+)\.(\w+)", cell.source, re.MULTILINE):
            file = {"networks": "model"}.get(file, file)
            place = ROOT if (ROOT / f"{file}.py").exists() else ROOT / "notebooks"
            source = (place / f"{file}.py").read_text()
            nodes = [node for node in ast.parse(source).body
                     if name in {getattr(node, "name", "")} | {getattr(target, "id", "") for target in getattr(node, "targets", ())}]
            assert ast.get_source_segment(source, nodes[0]) in shown, (path.name, name)


def test_the_difference_that_is_shown_is_todays(monkeypatch):
    """The first cell of notebook 4 compares two scripts; it says today what is saved with it."""
    first, displayed = cells(ROOT / "notebooks" / "4_supervised_finetuning.ipynb", "code")[0], []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("IPython.display.display", displayed.append)
    exec(first.source, {})
    assert displayed and [html.data for html in displayed] == [output.data["text/html"] for output in first.outputs]


def test_the_tables_that_are_shown_are_on_record():
    """read_out("..."): the table that is saved with notebook 7 is what records/claims.jsonl gives."""
    record, shown = claims.read_record(ROOT / "records" / "claims.jsonl"), []
    for cell in cells(NOTEBOOKS[-1], "code"):
        for claim in re.findall(r'^read_out\("(\w+)"\)', cell.source, re.MULTILINE):
            shown.append(claim)
            saved = "".join(output.get("data", {}).get("text/markdown", "") for output in cell.outputs)
            assert claims.table_of(record, claim) in saved, claim
    assert set(shown) == {row["claim"] for row in record} - {"over_optimisation"}


@every_notebook
def test_uses_the_files_and_redefines_nothing(path):
    """At least two of our files are imported, and no function or class of theirs is written again."""
    files = {file.stem: ast.parse(file.read_text())
             for file in [*ROOT.glob("*.py"), *(ROOT / "notebooks").glob("*.py")]}
    definitions = (ast.FunctionDef, ast.ClassDef)
    ours = {node.name for tree in files.values() for node in tree.body if isinstance(node, definitions)}
    lectures = "".join(cell.source for cell in cells(path, "markdown"))
    hidden = [part for pair in hidden_answers(lectures) for part in pair]
    imported, defined = set(), set()
    for source in [cell.source for cell in cells(path, "code")] + hidden:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imported |= {getattr(node, "module", None)} | {name.name for name in node.names}
            elif isinstance(node, definitions):
                defined.add(node.name)
    assert len(imported & set(files)) >= 2
    assert not defined & ours, defined & ours


@every_notebook
def test_reads_like_a_lecture(path):
    """Cells of a screen's height, claims that are asserted, and exercises with hidden answers at the end."""
    code, markdown = cells(path, "code"), cells(path, "markdown")
    assert nbformat.read(path, 4).cells[0].source.startswith(f"# {path.name[0]}. ")
    for cell in code:
        lines = cell.source.splitlines()
        assert len(lines) <= 22 and max(map(len, lines)) <= 110, cell.source
    assert any(isinstance(node, ast.Assert) for cell in code for node in ast.walk(ast.parse(cell.source)))
    headings = re.findall(r"^## (.*)$", "\n".join(cell.source for cell in markdown), re.MULTILINE)
    answers = [pair for cell in markdown for pair in hidden_answers(cell.source)]
    assert headings[-1] == "Exercises" and "</details>" in nbformat.read(path, 4).cells[-1].source
    assert 3 <= len(answers) == sum("answer = ..." in cell.source for cell in code)
    assert all("answer" in answer and "assert" in test for answer, test in answers)


def test_the_readme_names_every_notebook_in_order():
    named = re.findall(r"notebooks/(\w+\.ipynb)", (ROOT / "README.md").read_text())
    assert list(dict.fromkeys(named)) == [path.name for path in NOTEBOOKS]

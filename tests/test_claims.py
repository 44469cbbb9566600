"""notebooks/claims.py: its arithmetic, and that the committed record is what it would write."""
import math
import re
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

import claims
from errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RECORD, README = ROOT / "records" / "claims.jsonl", (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_fit_finds_the_curve_it_was_made_from():
    """gold = d (alpha - beta d) for best-of-n, d (alpha - beta log d) for RL (Gao et al. 2022)."""
    d = np.linspace(0.2, 5, 20)
    assert claims.claims_rl.fit_of_gold(d, d * (0.3 - 0.04 * d), logarithm=False) == pytest.approx((0.3, 0.04))
    assert claims.claims_rl.fit_of_gold(d, d * (0.3 - 0.04 * np.log(d)), logarithm=True) == pytest.approx((0.3, 0.04))


def test_interval_is_students():
    """Of 1, 2, 3: mean 2, standard deviation 1, t = 4.303 at two degrees of freedom."""
    mean, half = claims.mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(claims.mean_and_interval([1.0])[1])


def test_table_has_a_line_per_row_and_no_other_claims():
    rows = [{"claim": "a", "seed": seed, "row": row, "gold": gold} for row, golds in
            (("sft", (0.5, 0.6, 0.7)), ("ppo", (0.8,))) for seed, gold in enumerate(golds)]
    table = claims.table_of(rows + [{"claim": "b", "row": "other", "gold": 0.1}], "a")
    assert table.splitlines()[2:] == ["| sft | 0.600 ± 0.248 |", "| ppo | 0.800 |"]
    rows[3] |= {"gold": None, "diverged": "the loss is not finite"}
    assert claims.table_of(rows, "a").splitlines()[3] == "| ppo (1 diverged) |  |"


@pytest.mark.parametrize("claim", sorted({row["claim"] for row in claims.read_record(RECORD)}))
def test_what_is_on_record_is_shown(claim):
    """In the README behind a mark, with the record's figures, or in the notebook, which reads them itself."""
    marked = f"<!-- claims.py --only {claim} -->\n\n"
    if marked in README:
        assert marked + claims.table_of(claims.read_record(RECORD), claim) + "\n" in README
    else:
        assert f'\\"{claim}\\"' in (ROOT / "notebooks" / "7_the_claims_measured.ipynb").read_text(encoding="utf-8")


def test_nothing_is_shown_that_is_not_on_record():
    on_record = {row["claim"] for row in claims.read_record(RECORD)}
    assert set(re.findall(r"<!-- claims.py --only (\w+) -->", README)) <= on_record


def test_an_unknown_measurement_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no measurement luck; there are structures"):
        claims.main(claims.Config(only="luck", record=str(tmp_path / "claims.jsonl")))
    assert not (tmp_path / "claims.jsonl").exists()


def test_an_interruption_keeps_what_was_not_measured_again(tmp_path, monkeypatch):
    """The rows of a measurement and seed are replaced when there are new ones; named twice, it has them once."""
    def submit(pool, function, config, name, seed):
        job = Future()
        rows = [{"claim": name, "seed": seed, "row": "new"}]
        job.set_result(rows) if seed == 1 else job.set_exception(KeyboardInterrupt())
        return job
    monkeypatch.setattr(claims, "ProcessPoolExecutor", type("Pool", (), {
        "__init__": lambda *_: None, "submit": submit, "shutdown": lambda *_, **__: None}))
    monkeypatch.setattr(claims, "as_completed", iter)
    monkeypatch.setattr(claims.corpus, "load_records", lambda *_: [])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    record = tmp_path / "claims.jsonl"
    record.write_text("".join(f'{{"claim": "ptx", "seed": {seed}, "row": "old"}}\n' for seed in (1, 2, 3)))
    with pytest.raises(KeyboardInterrupt):
        claims.main(claims.Config(only="ptx,ptx", record=str(record)))
    assert [(row["seed"], row["row"]) for row in claims.read_record(record)] == [(1, "new"), (2, "old"), (3, "old")]


@pytest.mark.parametrize("name", ["seeds", "prompts", "best_of"])
def test_numbers_are_checked_before_anything_is_trained(name, tmp_path):
    with pytest.raises(UserError, match=f"{name} is 0"):
        claims.main(claims.Config(**{name: 0}, only="hackable", out=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_every_measurement_says_what_is_claimed():
    for measurement in claims.MEASUREMENTS:
        assert 20 < len(measurement.__doc__.splitlines()[0]) < 110

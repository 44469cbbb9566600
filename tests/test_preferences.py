"""Comparisons: a labeller's mistakes, ties, sources, length, the reward's zero; and what learns from them."""
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import corpus
import data
import labeller
import masks
import model as networks
import objectives
import train_rm
from conftest import STRUCTURES, random_tokens


def ranked_examples(n: int, K: int = 5) -> list[data.Example]:
    """Prompts with K answers each; their gold scores are multiples of 0.05, so that many gaps are ties."""
    return [data.Example(random_tokens(4), [random_tokens(3) for _ in range(K)],
                         ranking=tuple((torch.randint(0, 12, (K,)) * 0.05).tolist())) for _ in range(n)]


def ordered_answers(examples: list[data.Example]) -> set:
    """All (prompt, better answer, worse answer), as a reader of the comparisons sees them."""
    preference = data.preferences(examples, labeller.TIE)
    return {(tuple(examples[p].source), tuple(examples[p].targets[w]), tuple(examples[p].targets[l]))
            for p, w, l in preference.nonzero().tolist()}


# ---- the labeller's mistakes -------------------------------------------------------------------------------

@pytest.mark.parametrize("share", [0.15, 0.5])
def test_the_labeller_is_wrong_as_often_as_asked(share):
    """A share of the untied pairs is turned round, within four standard deviations; ties stay ties."""
    clean = ranked_examples(300)
    before, after = (data.preferences(examples, labeller.TIE)
                     for examples in (clean, labeller.with_mistakes(clean, share, seed=1)))
    untied = before | before.mT
    assert torch.equal(untied, after | after.mT) and not (after & after.mT).any() and not untied.all()
    n, wrong = int(before.sum()), int((before & ~after).sum())
    assert abs(wrong / n - share) < 4 * (share * (1 - share) / n) ** 0.5
    assert wrong == sum(len(example.mistakes) for example in labeller.with_mistakes(clean, share, seed=1))


def test_mistakes_belong_to_the_pair_and_the_seed():
    """Other neighbours, another order of prompts or of answers: the same mistakes. Another seed: others."""
    examples = ranked_examples(40)
    expected = ordered_answers(labeller.with_mistakes(examples, 0.3, seed=1))
    assert expected != ordered_answers(examples)
    assert ordered_answers(labeller.with_mistakes(examples, 0.0, seed=1)) == ordered_answers(examples)
    assert ordered_answers(labeller.with_mistakes(examples[::-1], 0.3, seed=1)) == expected
    alone = [ordered_answers(labeller.with_mistakes([example], 0.3, seed=1)) for example in examples]
    assert set().union(*alone) == expected
    shuffled = [example._replace(targets=example.targets[::-1], ranking=example.ranking[::-1])
                for example in examples]
    assert ordered_answers(labeller.with_mistakes(shuffled, 0.3, seed=1)) == expected
    assert ordered_answers(labeller.with_mistakes(examples, 0.3, seed=2)) != expected


# ---- ties, agreement, length -------------------------------------------------------------------------------

def test_a_tie_counts_nowhere():
    """A gap below TIE: no loss, no gradient, no pair of the accuracy, whichever the scores prefer."""
    close = data.Example([1], [[2], [3]], ranking=(0.5, 0.5 + 0.9 * labeller.TIE))
    apart = close._replace(ranking=(0.5, 0.5 + 1.1 * labeller.TIE))
    for scores in ([3.0, 0.0], [0.0, 3.0]):
        scores_PK = torch.tensor([scores, [0.0, 0.0]], requires_grad=True)
        loss = objectives.pairwise_reward_loss(scores_PK, data.preferences([close, apart], labeller.TIE))
        loss.backward()
        assert loss.item() == pytest.approx(np.log(2)) and (scores_PK.grad[0] == 0).all()
        assert "accuracy" not in labeller.agreement([(close, scores)])
        with_tie = labeller.agreement([(close, scores), (apart, [0.0, 1.0]), (apart, [1.0, 0.0])])
        assert with_tie["accuracy"] == 0.5


def test_agreement_equals_the_loop():
    """Accuracies of all pairs, by kind and by origin, for prompts with unequally many answers; Pearson's r."""
    torch.manual_seed(3)
    scored = []
    for i in range(40):
        K = 2 + i % 4
        targets = [random_tokens(1 + int(torch.randint(9, ()))) for _ in range(K)]
        scored.append((data.Example([i], targets, ranking=tuple(torch.rand(K).tolist()), human=i % 3 == 0,
                                    origin="ab"[i % 2]), torch.randn(5).tolist()))
    right, lengths, flat = {}, [], []
    for example, scores in scored:
        lengths, flat = lengths + list(map(len, example.targets)), flat + scores[:len(example.targets)]
        for w, l in itertools.permutations(range(len(example.targets)), 2):
            if example.ranking[w] - example.ranking[l] >= labeller.TIE:
                kind = "human_sample" if example.human and 0 in (w, l) else "sample_sample"
                for name in ("accuracy", f"accuracy_{kind}", f"accuracy_{example.origin}"):
                    right.setdefault(name, []).append(scores[w] > scores[l])
    expected = {name: np.mean(values) for name, values in right.items()}
    expected |= {f"pairs_{origin}": len(right[f"accuracy_{origin}"]) for origin in "ab"}
    expected["length_correlation"] = np.corrcoef(flat, lengths)[0, 1]
    assert labeller.agreement(scored) == pytest.approx(expected, abs=1e-6)
    one = [(example._replace(origin="a"), scores) for example, scores in scored]
    assert not any(name.endswith(("_a", "_b")) for name in labeller.agreement(one))


def test_correlation_of_what_does_not_vary_is_zero():
    """A straight line has r = 1 or -1; a constant has none, and is no division by zero."""
    x = torch.tensor([1.0, 2.0, 4.0])
    assert objectives.correlation(x, 3 * x + 1).item() == pytest.approx(1)
    assert objectives.correlation(x, -x).item() == pytest.approx(-1)
    assert objectives.correlation(x, torch.full((3,), 0.7)).item() == 0


# ---- sources -----------------------------------------------------------------------------------------------

def write_comparisons(path, n: int, **more) -> None:
    """hh-rlhf's format: two dialogues that differ in their last reply."""
    path.parent.mkdir(exist_ok=True)
    rows = [{"chosen": f"\n\nHuman: {path.stem} {i}?\n\nAssistant: Yes.",
             "rejected": f"\n\nHuman: {path.stem} {i}?\n\nAssistant: no no no", **more} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_record_knows_its_source(tmp_path):
    """A folder of .jsonl files, or several with commas between: the file's name, or the record's own key."""
    write_comparisons(tmp_path / "d" / "helpful.jsonl", 3)
    write_comparisons(tmp_path / "d" / "harmless.jsonl", 2, source="red team")
    listed = f"{tmp_path}/d/helpful.jsonl, {tmp_path}/d/harmless.jsonl"
    for path in (str(tmp_path / "d"), listed):
        records = corpus.load_records(path)
        assert sorted(record.origin for record in records) == ["helpful"] * 3 + ["red team"] * 2
        assert all(record.chosen == " Yes." for record in records)
    write_comparisons(tmp_path / "e" / "helpful.jsonl", 1)
    records = corpus.load_records(f"{tmp_path}/d/helpful.jsonl,{tmp_path}/e/helpful.jsonl")
    assert [record.origin for record in records] == ["d/helpful"] * 3 + ["e/helpful"]


def test_each_of_several_files_is_held_to_account(tmp_path):
    """A file that is missing or empty is named, though the others are in order; a comma may be in a name."""
    write_comparisons(tmp_path / "good.jsonl", 2)
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, fragment in (("missing.jsonl", "no such file"), ("empty.jsonl", "empty")):
        with pytest.raises(corpus.UserError, match=f"{name}: .*{fragment}"):
            corpus.load_records(f"{tmp_path}/good.jsonl,{tmp_path}/{name}")
    write_comparisons(tmp_path / "a,b.jsonl", 2)
    assert len(corpus.load_records(str(tmp_path / "a,b.jsonl"))) == 2


# ---- the reward's zero -------------------------------------------------------------------------------------

def scores_of(model, example: data.Example, tokenizer) -> list[float]:
    batch = data.lay_out([example], model.config.structure, 1, tokenizer)
    return model(batch, masks.of_batch(model.config.structure, batch), batch.last).tolist()


@pytest.mark.parametrize("human", [True, False])
def test_the_rewards_zero_is_the_human_answer(human, random_model, tokenizer, tmp_path):
    """After normalise human answers average 0; where there are none, all answers do. The spread is 1."""
    model = networks.ScalarModel(random_model("causal")).requires_grad_(False)
    examples = [example._replace(human=human) for example in ranked_examples(20)]
    run = common.Run(tmp_path, torch.device("cpu"), torch.float32)
    before = [scores_of(model, example, tokenizer) for example in examples]
    train_rm.normalise(train_rm.Config(), run, SimpleNamespace(train=examples, tokenizer=tokenizer), model)
    after = [scores_of(model, example, tokenizer) for example in examples]
    zero = [scores[0] for scores in after] if human else sum(after, [])
    assert np.mean(zero) == pytest.approx(0, abs=1e-5) and np.std(sum(after, []), ddof=1) == pytest.approx(1)
    assert np.corrcoef(sum(before, []), sum(after, []))[0, 1] == pytest.approx(1) and abs(np.mean(before)) > 1e-3

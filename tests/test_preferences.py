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
import train_dpo
import train_rm
from conftest import STRUCTURES, random_tokens
from errors import UserError


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

def test_answers_to_other_prompts_are_ranked_too(tokenizer, monkeypatch):
    """mismatched=2: each prompt's own answer, its samples, then the human answers of the two that follow it,
    no longer than a sample may be, all in the labeller's order; none of them is the prompt's own.
    """
    monkeypatch.setattr(labeller, "generate_many", lambda run, model, prompts, tokenizer, *_:
                        [tokenizer.encode(f"sample {k}") for k in range(len(prompts))])
    records = [corpus.Record(f"f{k}", prompt=f"def read_{noun}():\n", response=f"Read the {noun}.")
               for k, noun in enumerate(("mask", "token", "row", "page"))]
    config, run = train_rm.Config(answers=3, mismatched=2, max_new=4), common.Run(None, torch.device("cpu"), torch.float32)
    judge = SimpleNamespace(gold=lambda prompt, answer: float(len(answer)))
    found = labeller.collect_rankings(config, run, tokenizer, records, [None], judge, training=True)
    human = [example.targets[0] for example in found]
    for i, example in enumerate(found):
        texts = [tokenizer.decode(answer) for answer in example.targets]
        assert texts[1:3] == [f"sample {2 * i}", f"sample {2 * i + 1}"]
        assert example.targets[3:] == [human[(i + 1) % 4][:4], human[(i + 2) % 4][:4]] and len(human[i]) > 4
        assert example.ranking == tuple(map(float, map(len, texts)))
    held_out = labeller.collect_rankings(config, run, tokenizer, records, [None], judge, training=False)
    assert all(len(example.targets) == 3 for example in held_out)
    with pytest.raises(UserError, match="mismatched is -1"):
        common.set_up(train_rm.Config(mismatched=-1))


def test_samplers_share_the_samples(tokenizer, monkeypatch):
    """answers=4 leaves three samples to a prompt: two of the first sampler and one of the second, each an answer
    to its own prompt. More samplers than samples are refused.
    """
    monkeypatch.setattr(labeller, "generate_many",
                        lambda run, model, prompts, *_: [(model, prompt) for prompt in prompts])
    config = train_rm.Config(answers=4)
    samples = labeller.samples_of(config, None, tokenizer, [[1], [2]], ["sft", "ppo"])
    assert samples == [[("sft", [k]), ("sft", [k]), ("ppo", [k])] for k in (1, 2)]
    with pytest.raises(UserError, match="sampler names 4 runs, and answers 4 leaves room for 3"):
        labeller.samples_of(config, None, tokenizer, [[1]], ["a", "b", "c", "d"])


def test_an_answer_is_not_compared_with_itself(tokenizer, capsys):
    """It is left out and counted; the labeller judges where at least half of the prompts are functions'."""
    records = [corpus.Record(f"f{k}", prompt="Is it?", chosen="Yes.", rejected=rejected)
               for k, rejected in enumerate(("Yes.", "No.", "No!"))]
    run = common.Run(None, torch.device("cpu"), torch.float32)
    found = labeller.collect_rankings(train_rm.Config(), run, tokenizer, records, [None], None, training=True)
    assert len(found) == 2 and "1 comparisons of an answer with itself are left out" in capsys.readouterr().out
    function, other = corpus.Record("f", prompt="def f():\n"), records[0]
    assert labeller.can_judge([function, other]) and not labeller.can_judge([function, other, other])


def test_only_the_prompt_needs_room_for_samples(tokenizer, monkeypatch, capsys):
    """A human answer may fill the context; a prompt that leaves a sample no room is dropped and counted."""
    monkeypatch.setattr(labeller, "generate_many", lambda run, model, prompts, tokenizer, *_: [[tokenizer.end]] * len(prompts))
    long = " ".join(["Return"] * 20)
    records = [corpus.Record("f", prompt="def f():\n", response=long), corpus.Record("g", prompt=long, response="Go.")]
    config, run = train_rm.Config(answers=2, mismatched=0), common.Run(None, torch.device("cpu"), torch.float32)
    config.context = tokenizer.around + 1 + len(tokenizer.encode("def f():\n" + long))
    config.max_new = config.context - tokenizer.around - len(tokenizer.encode("def f():\n"))
    judge = SimpleNamespace(gold=lambda prompt, answer: 1.0)
    (kept,) = labeller.collect_rankings(config, run, tokenizer, records, [None], judge, training=False)
    assert tokenizer.decode(kept.targets[0]) == long and "1 of 2 prompts have more than" in capsys.readouterr().out


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
    unseen = labeller.agreement(one, {"a", "b"})               # b is in the data, but no held-out pair is of it
    assert unseen["pairs_b"] == 0 and "accuracy_b" not in unseen and unseen["accuracy_a"] == unseen["accuracy"]


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


def test_dialogues_that_part_early_are_compared_from_there():
    """Some of hh-rlhf's differ in more than the last reply; some have an empty one."""
    asked = "\n\nHuman: Hi?\n\nAssistant:"
    early = corpus.common_prompt(asked + " Yes.\n\nHuman: Why?\n\nAssistant: So.", asked + " No.")
    assert early == {"prompt": asked, "chosen": " Yes.\n\nHuman: Why?\n\nAssistant: So.", "rejected": " No."}
    for empty in ("", " \n"):
        found = corpus.common_prompt(asked + empty, asked + " No.")
        assert found == {"prompt": asked, "chosen": "", "rejected": " No."}
    with pytest.raises(ValueError, match="one dialogue"):
        corpus.common_prompt("\n\nHuman: A\n\nAssistant: B", "\n\nHuman: C\n\nAssistant: D")


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


def test_what_a_file_may_be(tmp_path):
    """Text, .jsonl (a byte-order mark in front or not) and Python; what else is refused, and why a folder is empty."""
    for name, content in (("a.txt", "Some text."), ("b.md", "Some text."), ("c.jsonl", '\ufeff{"text": "Some text."}')):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert [record.text for record in corpus.load_records(str(tmp_path / name))] == ["Some text."]
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / "f.py").write_text("def f():\n    pass\n")
    (tmp_path / "t.csv").write_text("text\nSome text.\n")
    for name, fragment in (("t.csv", "must be .jsonl, .py or text"), ("silent/f.py", "no docstrings"),
                           ("silent", "no docstrings and no .jsonl; its texts")):
        with pytest.raises(corpus.UserError, match=fragment):
            corpus.load_records(str(tmp_path / name))


def test_compared_dialogues_may_be_lists_of_messages():
    """As one dialogue twice, or with what they share in `prompt`; they are the texts that hh-rlhf would have."""
    asked, yes, no = ({"role": role, "content": content} for role, content in
                      (("user", "Is it?"), ("assistant", "Yes."), ("assistant", "No.")))
    expected = [{"prompt": "\n\nHuman: Is it?\n\nAssistant:", "chosen": " Yes.", "rejected": " No."}]
    assert corpus.fields_of({"chosen": [asked, yes], "rejected": [asked, no]}) == expected
    assert corpus.fields_of({"prompt": [asked], "chosen": [yes], "rejected": [no]}) == expected
    assert corpus.fields_of({"prompt": "Is it?", "chosen": [yes], "rejected": [no]}) == expected
    ultrafeedback = {"prompt": "Is it?", "chosen": [asked, yes], "rejected": [asked, no], "messages": [asked, yes]}
    assert corpus.fields_of(ultrafeedback) == expected                      # the comparison counts, not the messages
    for wrong, fragment in (({"chosen": [asked, yes], "rejected": [yes]}, "one dialogue"),
                            ({"chosen": [asked, yes], "rejected": "No."}, "must be too"),
                            ({"chosen": [asked], "rejected": [asked]}, "no reply")):
        with pytest.raises(ValueError, match=fragment):
            corpus.fields_of(wrong)


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
    model.mean.fill_(0.3), model.std.fill_(2.0)                # as a run that goes on finds them
    before = [scores_of(model, example, tokenizer) for example in examples]
    train_rm.normalise(train_rm.Config(), run, SimpleNamespace(train=examples, tokenizer=tokenizer), model)
    after = [scores_of(model, example, tokenizer) for example in examples]
    zero = [scores[0] for scores in after] if human else sum(after, [])
    assert np.mean(zero) == pytest.approx(0, abs=1e-5) and np.std(sum(after, []), ddof=1) == pytest.approx(1)
    assert np.corrcoef(sum(before, []), sum(after, []))[0, 1] == pytest.approx(1) and abs(np.mean(before)) > 1e-3


def test_human_answers_are_found_among_many(random_model, tokenizer):
    """500 prompts are read, and those with a human answer first, wherever they stand."""
    model = networks.ScalarModel(random_model("causal")).requires_grad_(False)
    run = common.Run(None, torch.device("cpu"), torch.float32)
    human = [example._replace(human=True) for example in ranked_examples(3, K=2)]
    loaded = SimpleNamespace(train=ranked_examples(500, K=2) + human, tokenizer=tokenizer)
    train_rm.normalise(train_rm.Config(), run, loaded, model)
    assert np.mean([scores_of(model, example, tokenizer)[0] for example in human]) == pytest.approx(0, abs=1e-5)


# ---- DPO: log-probabilities of whole answers ---------------------------------------------------------------

@torch.no_grad()
def logprob_alone(model, prompt: list[int], answer: list[int], tokenizer) -> float:
    """log p(answer | prompt), the pair alone in its row, token by token in float64."""
    batch = data.lay_out([data.Example(prompt, [answer])], model.config.structure, 1, tokenizer)
    logits_NV = model(batch, masks.of_batch(model.config.structure, batch), batch.loss_mask)
    assert len(logits_NV) == len(answer)
    return sum(float(row.double().log_softmax(0)[token]) for row, token in zip(logits_NV, answer))


def uneven_examples() -> list[data.Example]:
    """Prompts of several lengths, the empty one too, with one to four answers, the first not the longest."""
    sizes = [(3, (2, 5, 1)), (0, (1, 1)), (5, (4,)), (2, (1, 2, 3, 4)), (4, (3, 3))]
    return [data.Example(random_tokens(n), [random_tokens(k) for k in answers],
                         ranking=tuple((torch.randperm(len(answers)) * 0.2).tolist()), human=n > 2)
            for n, answers in sizes]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_answers_of_a_shared_row_have_the_logprobs_they_have_alone(structure, random_model, tokenizer):
    """Every token of every answer is counted once, its first one too, which all answers owe to the prompt."""
    model, examples = random_model(structure, layers=2), uneven_examples()
    batch = data.lay_out(examples, structure, 14, tokenizer)
    logits_NV = model(batch, masks.of_batch(structure, batch), batch.loss_mask)
    logprobs_PK = data.answer_logprobs(logits_NV, batch, examples)
    assert logprobs_PK.shape == (5, 4)
    for p, example in enumerate(examples):
        expected = [logprob_alone(model, example.source, answer, tokenizer) for answer in example.targets]
        assert logprobs_PK[p].tolist() == pytest.approx(expected + [0.0] * (4 - len(expected)), abs=2e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("micro_batch_size", [0, 2])
def test_a_step_of_dpo_equals_the_loop(structure, micro_batch_size, random_model, tokenizer, tmp_path):
    """Rafailov et al. 2023, eq. 7, pair by pair; a mean over the pairs of each prompt, then over the prompts."""
    policy, reference = random_model(structure).requires_grad_(True), random_model(structure)
    examples = uneven_examples()
    loaded = SimpleNamespace(train=examples, reference=reference, tokenizer=tokenizer)
    config = train_dpo.Config(batch_size=5, micro_batch_size=micro_batch_size, row=14, beta=0.3, clip=0.0)
    expected = 0.0
    for example in examples:
        ratio = [logprob_alone(policy, example.source, answer, tokenizer)
                 - logprob_alone(reference, example.source, answer, tokenizer) for answer in example.targets]
        losses = [np.log1p(np.exp(-0.3 * (ratio[w] - ratio[l])))
                  for w, l in itertools.permutations(range(len(ratio)), 2)
                  if example.ranking[w] - example.ranking[l] >= labeller.TIE]
        expected += np.mean(losses) / 5 if losses else 0.0
    run = common.Run(tmp_path, torch.device("cpu"), torch.float32)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    losses = [train_dpo.train_step(config, run, loaded, policy, optimizer, step)["train_loss"] for step in range(3)]
    assert losses[0] == pytest.approx(expected, rel=1e-4) and losses[2] < losses[0]


def test_dpo_begins_at_the_reference(random_model, tokenizer, tmp_path):
    """Policy and reference alike: every log-ratio is exactly 0 and every pair costs ln 2."""
    policy, examples = random_model("causal").requires_grad_(True), uneven_examples()[:1]
    loaded = SimpleNamespace(train=examples, reference=policy, tokenizer=tokenizer)
    run = common.Run(tmp_path, torch.device("cpu"), torch.float32)
    step = train_dpo.train_step(train_dpo.Config(batch_size=1), run, loaded, policy,
                                torch.optim.SGD(policy.parameters(), lr=0.01), 0)
    assert step["train_loss"] == pytest.approx(np.log(2), abs=1e-7) and step["grad_norm"] > 0


@pytest.mark.parametrize("stage", [train_rm, train_dpo])
def test_a_step_is_clipped_and_leaves_no_gradient(stage, random_model, tokenizer):
    """The gradient's norm is `clip` at most: with plain SGD at a rate of 1 the weights move as far."""
    policy, run = random_model("causal"), common.Run(None, torch.device("cpu"), torch.float32)
    model = (networks.ScalarModel(policy) if stage is train_rm else policy).requires_grad_()
    loaded = SimpleNamespace(train=uneven_examples(), reference=random_model("causal"), tokenizer=tokenizer)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stage.train_step(stage.Config(batch_size=5, clip=1e-2), run, loaded, model, optimizer, 0)
    moved = torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert float(moved.norm()) == pytest.approx(1e-2, rel=1e-2)
    assert all(p.grad is None for p in model.parameters())


def test_means_over_pairs_equal_the_loop():
    """The better and the worse answer of every untied pair, ties left out; no pair, no margin."""
    scored = [(data.Example([1], [[2], [3], [4]], ranking=(0.9, 0.5, 0.46)), [1.0, 3.0, 7.0]),
              (data.Example([1], [[2], [3]], ranking=(0.0, 1.0)), [5.0, 6.0, 0.0])]
    assert train_dpo.rewards_of_pairs(scored) == {"reward_better": (1 + 1 + 6) / 3, "reward_worse": 5.0,
                                                  "margin": pytest.approx((1 + 1 + 6) / 3 - 5.0)}
    tied = [(data.Example([1], [[2], [3]], ranking=(0.5, 0.5)), [5.0, 6.0])]
    assert train_dpo.rewards_of_pairs(tied)["margin"] == 0


def test_the_evaluation_of_dpo_equals_the_loop(random_model, tokenizer, tmp_path, monkeypatch):
    """eval_loss per token of the human answers, eval_kl per sampled answer, the means of both rewards."""
    policy, reference, examples = random_model("prefix"), random_model("prefix"), uneven_examples()
    answers = [random_tokens(1 + i) for i in range(len(examples))]
    asked = []
    monkeypatch.setattr(train_dpo, "generate_many", lambda *arguments: asked.append(arguments[5]) or answers)
    judge = SimpleNamespace(golds=lambda prompts, answers: [float(len(answer)) for answer in answers])
    loaded = SimpleNamespace(train=examples, held_out=examples, reference=reference, tokenizer=tokenizer, labeller=judge)
    run = common.Run(tmp_path, torch.device("cpu"), torch.float32)
    found = train_dpo.evaluate(train_dpo.Config(row=14, beta=0.3), run, loaded, policy)

    def ratio(example, answer):
        return (logprob_alone(policy, example.source, answer, tokenizer)
                - logprob_alone(reference, example.source, answer, tokenizer))
    human = [example for example in examples if example.human]
    nats = -sum(logprob_alone(policy, example.source, example.targets[0], tokenizer) for example in human)
    assert 0 < len(human) < len(examples) and asked == [0.0, 1.0]
    assert found["eval_loss"] == pytest.approx(nats / sum(len(example.targets[0]) for example in human), rel=1e-4)
    kl = np.mean([ratio(example, answer) for example, answer in zip(examples, answers)])
    assert found["eval_kl"] == pytest.approx(kl, abs=2e-4)
    assert found["eval_gold"] == np.mean([len(tokenizer.decode(answer)) for answer in answers])
    scored = [(example, [0.3 * ratio(example, answer) for answer in example.targets]) for example in examples]
    expected = {**labeller.agreement(scored), **train_dpo.rewards_of_pairs(scored)}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=2e-4)

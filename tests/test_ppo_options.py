"""What train_ppo.py offers beyond its defaults: rewards of one's own, ways to estimate, brakes, warnings."""
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import data
import masks
import model as networks
import objectives
import own_reward
import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from conftest import STRUCTURES, random_tokens
from errors import Fault, UserError
from generate import generate, never_drawn

RUN = common.Run(None, torch.device("cpu"), torch.float32)


def loaded_with(tokenizer) -> SimpleNamespace:
    return SimpleNamespace(tokenizer=tokenizer, pairs=[], labeller=SimpleNamespace(golds=lambda prompts, _: [0.0 for _ in prompts]))


def rollouts_of(config, random_model, tokenizer, structure="causal", answers=8):
    """(model, rollouts): answers to answers/config.samples prompts, scored in two parts."""
    model = train_ppo.FourModels(random_model(structure), networks.ScalarModel(random_model(structure)))
    model.reference = random_model(structure)
    groups = [[random_tokens(3)] * config.samples for _ in range(answers // config.samples)]
    prompts = sum(groups, [])
    written = [random_tokens(2 + k % 3) + [tokenizer.end] * (k % 2) for k in range(answers)]
    half = answers // 2
    return model, [train_ppo.score(config, RUN, loaded_with(tokenizer), model, prompts[at], written[at])
                   for at in (slice(0, half), slice(half, answers))]


# ---- the distribution that is scored is the one that is sampled --------------------------------------------

@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_scored_is_what_is_sampled(structure, temperature, random_model, tokenizer):
    """generate() draws no special token but <end>: over all others the probabilities of a first token add up
    to 1, for the policy and for the reference. And none of the tokens left out is ever drawn.
    """
    config = train_ppo.Config(temperature=temperature, row=64)
    model = train_ppo.FourModels(random_model(structure), networks.ScalarModel(random_model(structure)))
    never = set(never_drawn(model.policy.config.vocab, tokenizer, torch.device("cpu")).tolist())
    assert set(tokenizer.specials.values()) - {tokenizer.end} == never
    first = [[token] for token in range(tokenizer.vocab) if token not in never]
    rollout = train_ppo.score(config, RUN, loaded_with(tokenizer), model, [[5, 6, 7]] * len(first), first)
    for logprobs_BT in (rollout.logprobs, rollout.ref_logprobs):
        assert float(logprobs_BT[rollout.actions].exp().sum()) == pytest.approx(1.0, abs=1e-4)
    answers = generate(model.policy, [[5, 6, 7]] * 200, tokenizer, 4, temperature)
    assert not never & {token for answer in answers for token in answer}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_answers_are_as_frequent_as_they_are_scored(temperature, random_model, tokenizer):
    """At whatever temperature: 4,000 first tokens that sample() draws against the probabilities that score()
    gives them, by the policy and by the reference; those of another temperature are not these.
    """
    policy = random_model("causal")
    policy.unembedding.weight.mul_(2)                       # far from uniform: a temperature makes a difference
    model = train_ppo.FourModels(policy, networks.ScalarModel(random_model("causal")))
    config, loaded = train_ppo.Config(temperature=temperature, row=64, max_new=1), loaded_with(tokenizer)
    drawn = train_ppo.sample(config, RUN, loaded, model, [[5, 6, 7]] * 4000, step=0)
    counts = np.bincount([answer[0] for answer in drawn], minlength=tokenizer.vocab)
    tokens = np.nonzero(counts)[0].tolist()
    def distance(temperature: float, name: str) -> float:
        config.temperature = temperature
        r = train_ppo.score(config, RUN, loaded, model, [[5, 6, 7]] * len(tokens), [[token] for token in tokens])
        p = torch.zeros(tokenizer.vocab)
        p[r.batch.targets[r.actions]] = getattr(r, name)[r.actions].exp()
        return float((p - torch.tensor(counts / 4000)).abs().sum() / 2)
    for name in ("logprobs", "ref_logprobs"):
        assert distance(temperature, name) < 0.08 < 0.16 < distance(1.5 - temperature, name)


# ---- answers that share their prompt -----------------------------------------------------------------------

@pytest.mark.parametrize("structure, positions", [(structure, positions) for structure in STRUCTURES
                                                  for positions in ("rope", "learned", "rope2d")
                                                  if (structure, positions) != ("encdec", "rope2d")])
def test_answers_that_share_their_prompt_are_scored_as_alone(structure, positions, random_model, tokenizer):
    """Log-probabilities, values and rewards of every answer, read side by side and alone."""
    policy, reference, value, reward = (
        random_model(structure, positions=positions, max_positions=64 * (positions == "learned")) for _ in range(4))
    model = SimpleNamespace(policy=policy, reference=reference, value=networks.ScalarModel(value),
                            reward=networks.ScalarModel(reward))
    prompts = [prompt for prompt, n in (([5, 6, 7], 3), ([9], 2), ([8, 6], 1), ([], 2)) for _ in range(n)]
    answers = [random_tokens(k % 4) + [tokenizer.end if k % 3 else 11] for k in range(len(prompts))]
    found, computed = {}, {}
    for row in (1, 40):
        config = train_ppo.Config(row=row)
        with torch.no_grad():
            r = train_ppo.score(config, RUN, loaded_with(tokenizer), model, prompts, answers)
        order = np.lexsort((r.batch.positions[r.actions], data.answer_of_token(r.batch, r.actions)))
        found[row] = [getattr(r, name)[r.actions][order] for name in ("logprobs", "ref_logprobs", "values", "scores")]
        assert r.batch.targets[r.actions][order].tolist() == sum(answers, [])
        computed[row] = r.batch.padding()[1] - r.batch.padding()[0]
    for alone, together in zip(found[1], found[40]):
        torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
    # <bos> 5 6 7 is read once and not three times; by a decoder but for its last token
    assert computed[1] - computed[40] == {"causal": 2 * 3 + 1, "prefix": 0, "encdec": 2 * 4 + 2 + 1}[structure]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_own_reward_is_paid_to_its_answer(structure, random_model, tokenizer, tmp_path):
    """Whatever the layout: at the last token of each answer stands its own score, 1 off where it does not end."""
    (tmp_path / "mine.py").write_text("def reward(prompt, response):\n    return len(prompt) + len(response) / 100\n")
    reward = own_reward.RewardFunction(f"{tmp_path}/mine.py:reward", tokenizer, RUN)
    model = train_ppo.FourModels(random_model(structure), reward)
    texts = [("read the row", "Read it."), ("read the row", "Read the row."), ("close", "Close it."), ("read the row", "No.")]
    prompts, answers = zip(*((tokenizer.encode(p), tokenizer.encode(a) + [tokenizer.end]) for p, a in texts))
    answers[1].pop()
    for row in (1, 200):
        config = train_ppo.Config(row=row, advantage="rloo")
        r = train_ppo.score(config, RUN, loaded_with(tokenizer), model, prompts, answers)
        scores = r.scores[r.last_action][data.answer_of_token(r.batch, r.last_action).argsort()]
        assert scores.tolist() == pytest.approx([len(p) + len(a) / 100 - (k == 1) for k, (p, a) in enumerate(texts)])


# ---- rewards -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("advantage, equation", [("rloo", objectives.leave_one_out),
                                                 ("grpo", objectives.group_relative)])
def test_answers_of_a_prompt_are_compared(advantage, equation, random_model, tokenizer):
    """All tokens of an answer have its advantage: the equation's, on the sums of the answers' rewards."""
    config = train_ppo.Config(advantage=advantage, samples=2, row=16, beta=0.3)
    _, rollouts = rollouts_of(config, random_model, tokenizer)
    train_ppo.estimate_advantages(config, RUN, rollouts, config.beta)
    sums, advantages = [], []
    for r in rollouts:
        answer_BT = torch.full_like(r.batch.part, -1)
        answer_BT[r.actions] = data.answer_of_token(r.batch, r.actions)
        for answer in range(4):
            here = answer_BT == answer
            kl = (r.logprobs - r.ref_logprobs)[here].sum()
            sums.append(r.scores[here].sum() - 0.3 * kl)
            assert r.advantages[here].unique().numel() == 1
            advantages.append(r.advantages[here][0])
    expected = equation(torch.stack(sums).view(4, 2)).flatten()
    torch.testing.assert_close(torch.stack(advantages), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_penalty_is_the_estimator_asked_for(estimator, random_model, tokenizer):
    """Reward minus score is - beta k of the token."""
    config = train_ppo.Config(kl_estimator=estimator, row=16)
    _, rollouts = rollouts_of(config, random_model, tokenizer)
    train_ppo.estimate_advantages(config, RUN, rollouts, 0.5)
    for r in rollouts:
        d = (r.logprobs - r.ref_logprobs)[r.actions]
        k = {"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d}[estimator]
        torch.testing.assert_close((r.rewards - r.scores)[r.actions], -0.5 * k, atol=1e-5, rtol=1e-5)


def test_whitened_rewards_have_variance_one_and_their_mean(random_model, tokenizer):
    """Over the tokens of the whole iteration."""
    kept = {}
    for whiten in (False, True):
        torch.manual_seed(3)
        config = train_ppo.Config(whiten_rewards=whiten, row=16)
        _, rollouts = rollouts_of(config, random_model, tokenizer)
        train_ppo.estimate_advantages(config, RUN, rollouts, config.beta)
        kept[whiten] = torch.cat([r.rewards[r.actions] for r in rollouts])
    assert float(kept[True].var(unbiased=False)) == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(kept[True].mean(), kept[False].mean(), atol=1e-4, rtol=0)


def test_scores_are_clipped(random_model, tokenizer):
    """At +- score_clip, before the penalty for an answer without an end."""
    kept = {}
    for clip in (0.0, 0.1):
        torch.manual_seed(3)
        config = train_ppo.Config(score_clip=clip, no_end=2.0, row=16)
        _, rollouts = rollouts_of(config, random_model, tokenizer)
        kept[clip] = torch.cat([r.scores[r.last_action] for r in rollouts])
    unended = torch.where(kept[0.0] != 0, kept[0.1].abs() > 1, False)
    raw = kept[0.0] + 2.0 * unended
    torch.testing.assert_close(kept[0.1], raw.clamp(-0.1, 0.1) - 2.0 * unended, atol=1e-6, rtol=0)
    assert 0 < unended.sum() < 8 and (raw.abs() > 0.1).any()


def test_a_value_model_of_its_own_begins_at_zero(random_model, tokenizer):
    """value_init sft: 0 everywhere, and it can learn; value_init reward: what the reward model says."""
    reward = networks.ScalarModel(random_model("causal"))
    batch = data.lay_out([data.Example([1, 2], [[3, 4, tokenizer.end]])], "causal", 16, tokenizer)
    for value_init in ("sft", "reward"):
        model = train_ppo.FourModels(random_model("causal"), reward, value_init)
        values = model.value(batch, masks.of_batch("causal", batch), batch.loss_mask)
        scores = model.reward(batch, masks.of_batch("causal", batch), batch.loss_mask)
        assert all(p.requires_grad for p in model.value.parameters())
        assert (values == 0).all() if value_init == "sft" else torch.equal(values, scores)


def test_an_own_reward_reads_prompt_and_response(tokenizer, tmp_path):
    """As text, without the end token; its file may import what stands beside it."""
    source = ("from __future__ import annotations\nfrom dataclasses import dataclass\nfrom beside_it import PART\n"
              "@dataclass\nclass Weights:\n    part: float = PART\n"
              "def reward(prompt, response):\n    return len(prompt) + len(response) * Weights().part\n")
    (tmp_path / "mine.py").write_text(source)
    (tmp_path / "beside_it.py").write_text("PART = 0.01\n")
    function = own_reward.RewardFunction(f"{tmp_path}/mine.py:reward", tokenizer, RUN)
    pairs = [("abc", "d"), ("e", "fghi"), ("jk", "lm")]
    prompts, answers = zip(*((tokenizer.encode(p), tokenizer.encode(r) + [tokenizer.end]) for p, r in pairs))
    assert function(prompts, answers).tolist() == pytest.approx([len(p) + len(r) / 100 for p, r in pairs])


@pytest.mark.parametrize("content, name, fragment", [
    ("", "absent.py:reward", "there is no file"), ("", "mine.py", "name the function"),
    ("def other(prompt, response): return 0", "mine.py:reward", "has no function 'reward'"),
    ("def reward(prompt, response): return 1 / 0", "mine.py:reward", "ZeroDivisionError"),
    ("def reward(prompt): return 0", "mine.py:reward", "TypeError"),
    ("def reward(prompt, response): return None", "mine.py:reward", "gave None"),
    ("def reward(prompt, response): return '0.5'", "mine.py:reward", "gave '0.5'"),
    ("def reward(prompt, response): return b'0.5'", "mine.py:reward", "gave b'0.5'"),
    ("def reward(prompt, response): return float('nan')", "mine.py:reward", "finite"),
    ("def reward(prompt, response): return 1e300", "mine.py:reward", "finite"),
    ("import sys; sys.exit(3)", "mine.py:reward", "cannot be run: SystemExit"),
    ("import nothing_of_this_name", "mine.py:reward", "cannot be run")])
def test_a_bad_own_reward_is_one_sentence(tmp_path, tokenizer, content, name, fragment):
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(UserError, match=fragment):
        function = own_reward.RewardFunction(f"{tmp_path}/{name}", tokenizer, RUN)
        function.score("prompt", "response")


def test_an_own_reward_that_fails_on_the_way_is_a_fault(tokenizer, tmp_path):
    """Tried once before anything is written it is the user's mistake (exit code 2); later the run has begun (1)."""
    (tmp_path / "mine.py").write_text("def reward(prompt, response):\n    return 1 / len(response)\n")
    good, bad = ([[40]], [[41, tokenizer.end]]), ([[40]], [[tokenizer.end]])
    function = own_reward.RewardFunction(f"{tmp_path}/mine.py:reward", tokenizer, RUN)
    function(*good)
    with pytest.raises(Fault, match="ZeroDivisionError"):
        function(*bad)
    with pytest.raises(UserError, match="ZeroDivisionError"):
        own_reward.RewardFunction(f"{tmp_path}/mine.py:reward", tokenizer, RUN)(*bad)


# ---- the language-model loss mixed in, a KL target, a discount, the log's figures ---------------------------

@pytest.mark.parametrize("ptx", [0.3, 1.0])
@pytest.mark.parametrize("micro_batch_size", [0, 3])
def test_ptx_adds_the_gradient_of_the_mean_loss(ptx, micro_batch_size, random_model, tokenizer):
    policy = random_model("causal").requires_grad_()
    config = train_ppo.Config(ptx=ptx, ptx_size=4, row=16, micro_batch_size=micro_batch_size)
    loaded = loaded_with(tokenizer)
    loaded.pairs = [data.Example(random_tokens(3), [random_tokens(n) + [tokenizer.end]]) for n in (2, 5, 3, 4)]
    loss = train_ppo.mix_in(config, RUN, loaded, policy, 0)
    mixed = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    batch = data.lay_out(loaded.pairs, "causal", 16, tokenizer)
    logits_NV = policy(batch, masks.of_batch("causal", batch), batch.loss_mask)
    mean = torch.nn.functional.cross_entropy(logits_NV, batch.targets[batch.loss_mask])
    (ptx * mean).backward()
    assert loss == pytest.approx(float(mean.detach()), rel=1e-5)
    for ours, p in zip(mixed, policy.parameters()):
        torch.testing.assert_close(ours, p.grad, atol=1e-6, rtol=1e-4)


def test_an_update_holds_the_gradients_of_ppo_and_of_ptx(random_model, tokenizer):
    """With pairs the policy's gradient is that of the clipped loss and of mix_in together."""
    gradients = {}
    for ptx in (0.0, 0.3):
        torch.manual_seed(2)
        config = train_ppo.Config(row=16, ptx=ptx, ptx_size=2, clip=0.0)
        model, (rollout, _) = rollouts_of(config, random_model, tokenizer)
        train_ppo.estimate_advantages(config, RUN, [rollout], config.beta)
        model.policy.requires_grad_()
        loaded = loaded_with(tokenizer)
        loaded.pairs = [data.Example(random_tokens(3), [random_tokens(2) + [tokenizer.end]]) for _ in range(2)]
        idle = SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
        train_ppo.update(config, RUN, loaded, model, idle, [rollout], 0)
        gradients[ptx] = model.policy.embedding.weight.grad.clone()
    model.policy.zero_grad()
    train_ppo.mix_in(config, RUN, loaded, model.policy, 0)
    torch.testing.assert_close(gradients[0.3] - gradients[0.0], model.policy.embedding.weight.grad, atol=1e-6, rtol=1e-4)
    assert model.policy.embedding.weight.grad.abs().max() > 1e-4


def test_updates_are_numbered_through_the_run(monkeypatch):
    """By their number they choose the pairs that are mixed in."""
    numbers = []
    monkeypatch.setattr(train_ppo, "update", lambda *arguments: (
        numbers.append(arguments[6:]), {"off": 0.0, "ratio": 1.0, "approx_kl": 0.0})[1])
    train_ppo.learn(train_ppo.Config(epochs=2), RUN, None, None, None, [[], []], step=3)
    assert numbers == [(number, 3) for number in (12, 13, 14, 15)]


def test_beta_follows_the_kl_from_iteration_to_iteration(random_model, tokenizer, monkeypatch):
    """With a target: the rewards of an iteration have the beta that the one before has left."""
    charged, estimate = [], train_ppo.estimate_advantages
    monkeypatch.setattr(train_ppo, "estimate_advantages", lambda config, run, rollouts, beta: (
        charged.append(beta), estimate(config, run, rollouts, beta)))
    config = train_ppo.Config(batch_size=8, minibatch_size=4, max_new=4, row=16, ptx=0.0, beta=0.5, kl_target=1e-3,
                              lr=0.02)
    model = train_ppo.FourModels(random_model("causal").requires_grad_(), networks.ScalarModel(random_model("causal")))
    loaded, optimizer = loaded_with(tokenizer), train_ppo.build_optimizer(config, model)
    loaded.train = [data.Example(random_tokens(3), []) for _ in range(4)]
    first, second = (train_ppo.train_step(config, RUN, loaded, model, optimizer, step) for step in (0, 1))
    assert charged == [0.5, first["beta"]] and first["beta"] == 0.5 * 0.98          # no KL yet: as low as it may go
    assert second["kl"] > 0.01 and second["beta"] == first["beta"] * 1.02            # far beyond its target


def test_a_discount_reaches_the_returns(random_model, tokenizer):
    config = train_ppo.Config(row=16, gamma=0.8, lam=0.7)
    _, rollouts = rollouts_of(config, random_model, tokenizer)
    train_ppo.estimate_advantages(config, RUN, rollouts, config.beta)
    for r in rollouts:
        advantages = objectives.gae(r.rewards, r.values, r.actions, r.last_action, 0.8, 0.7)
        torch.testing.assert_close(r.returns[r.actions], (advantages + r.values)[r.actions])


def test_the_log_describes_the_answers(random_model, tokenizer):
    """Every figure of describe against a loop over the answers."""
    torch.manual_seed(4)
    config = train_ppo.Config(row=16, samples=2)
    _, rollouts = rollouts_of(config, random_model, tokenizer)
    train_ppo.estimate_advantages(config, RUN, rollouts, config.beta)
    answers = [[] for _ in range(8)]
    logprobs, entropies, scores = [0.0] * 8, [], [0.0] * 8
    for half, r in enumerate(rollouts):
        for at, answer in zip(r.actions.nonzero().tolist(), data.answer_of_token(r.batch, r.actions).tolist()):
            at, k = tuple(at), 4 * half + answer
            answers[k].append(int(r.batch.targets[at]))
            logprobs[k] += float(r.logprobs[at] - r.ref_logprobs[at])
            scores[k] += float(r.scores[at])
            entropies.append(float(r.entropy[at]))
    found = train_ppo.describe(RUN, loaded_with(tokenizer), [[0]] * 8, answers, rollouts)
    tokens = sum(answers, [])
    expected = {"kl": sum(logprobs) / 8, "reward": sum(scores) / 8, "entropy": sum(entropies) / len(tokens),
                "length": len(tokens) / 8, "ended": sum(a[-1] == tokenizer.end for a in answers) / 8,
                "repetition": sum(len(a) - len(set(a)) for a in answers) / len(tokens), "gold": 0.0}
    assert abs(expected["kl"]) > 0.01 and {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_the_logged_ratio_is_that_of_the_first_update(monkeypatch):
    """Where it must be 1; the other figures are means over all updates."""
    ratios = iter([1.0, 1.5, 2.0])
    monkeypatch.setattr(train_ppo, "update", lambda *_: {"off": 0.0, "ratio": next(ratios), "approx_kl": 0.0})
    assert train_ppo.learn(train_ppo.Config(epochs=3), RUN, None, None, None, [[]], step=0)["ratio"] == 1.0


# ---- brakes and warnings -----------------------------------------------------------------------------------

def test_the_gradient_of_each_network_is_clipped(random_model, tokenizer):
    """Policy and value model have a norm each, and not one together."""
    config = train_ppo.Config(row=16, ptx=0.0, clip=1e-3)
    model, (rollout, _) = rollouts_of(config, random_model, tokenizer)
    train_ppo.estimate_advantages(config, RUN, [rollout], config.beta)
    model.policy.requires_grad_()
    idle = SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
    train_ppo.update(config, RUN, loaded_with(tokenizer), model, idle, [rollout], 0)
    for network in (model.policy, model.value):
        norms = [p.grad.norm() for p in network.parameters() if p.grad is not None]
        assert float(torch.stack(norms).norm()) == pytest.approx(1e-3, rel=1e-2)


def test_epochs_end_when_the_policy_has_moved_far_enough(random_model, tokenizer, monkeypatch):
    """kl_stop: the first step beyond it is not taken, and is the last of the iteration."""
    moves = iter([0.01, 0.02, 0.05, 0.2, 0.3, 0.4])
    monkeypatch.setattr(train_ppo, "update", lambda *_: {"off": 0.0, "ratio": 1.0, "approx_kl": next(moves)})
    config = train_ppo.Config(epochs=3, kl_stop=0.1)
    done = train_ppo.learn(config, RUN, None, None, None, [[], []], step=0)
    assert done["updates"] == 3 and done["approx_kl"] == pytest.approx(0.07)


@pytest.mark.parametrize("kl_stop, taken", [(0.0, True), (1.0, True), (1e-4, False)])
def test_a_step_that_would_go_too_far_is_not_taken(kl_stop, taken, random_model, tokenizer):
    """Nor does its gradient stay behind. `approx_kl` is KL(policy that sampled || policy that learns) by k3."""
    config = train_ppo.Config(row=16, ptx=0.0, kl_stop=kl_stop)
    model, (rollout, _) = rollouts_of(config, random_model, tokenizer)
    train_ppo.estimate_advantages(config, RUN, [rollout], config.beta)
    rollout.logprobs = rollout.logprobs + 0.1 * torch.randn_like(rollout.logprobs) * rollout.actions
    model.policy.requires_grad_()
    optimizer, before = train_ppo.build_optimizer(config, model), model.policy.embedding.weight.clone()
    with torch.no_grad():
        logits_NV = train_ppo.answer_logits(config, loaded_with(tokenizer), model.policy, rollout.batch, rollout.masks,
                                            rollout.actions)
        now = objectives.token_logprobs(logits_NV, rollout.batch.targets[rollout.actions])
    then = rollout.logprobs[rollout.actions]
    done = train_ppo.update(config, RUN, loaded_with(tokenizer), model, optimizer, [rollout], 0)
    assert done["approx_kl"] == pytest.approx(float(((now - then).exp() - 1 - (now - then)).mean()), rel=1e-3)
    assert torch.equal(model.policy.embedding.weight, before) != taken
    assert all(p.grad is None for p in model.policy.parameters())


def test_warnings_name_what_has_changed():
    """Nothing to say of the first iteration; each sign by itself brings one sentence."""
    first = {"length": 15.0, "repetition": 0.1, "ended": 0.95, "entropy": 3.0, "kl": 0.0, "reward": 0.0}
    assert train_ppo.warnings_of(first, first) == []
    for name, value, word in (("length", 30.0, "30 tokens"), ("length", 6.0, "6 tokens"),
                              ("repetition", 0.5, "50% of the tokens"), ("ended", 0.4, "only 40%"),
                              ("entropy", 1.0, "1.00 nats"), ("kl", 40.0, "40 nats")):
        warning, = train_ppo.warnings_of(first | {name: value}, first)
        assert word in warning
    assert train_ppo.warnings_of(first | {"reward": 9.0}, first) == []


def test_every_rank_repeats_its_own_answers(random_model, tokenizer):
    """The draws are a function of seed, step and rank: each of them makes others, the same ones the same."""
    model, loaded = SimpleNamespace(policy=random_model("causal")), SimpleNamespace(tokenizer=tokenizer)
    def drawn(seed: int, step: int, rank: int) -> list:
        run = common.Run(None, torch.device("cpu"), torch.float32, rank, 2)
        config = train_ppo.Config(seed=seed, max_new=8)
        return train_ppo.sample(config, run, loaded, model, 4 * [[65, 66]], step)
    first = drawn(1, 0, 0)
    assert drawn(1, 0, 0) == first
    assert all(drawn(*other) != first for other in ((2, 0, 0), (1, 1, 0), (1, 0, 1)))


@pytest.mark.parametrize("samples, settings", [(1, dict(kl_target=6.0)), (2, dict(advantage="rloo", ptx=0.0))])
def test_the_glossary_names_every_column_of_the_log(samples, settings, random_model, tokenizer):
    """Notebook 6 explains what an iteration and an evaluation log, and nothing that is not logged."""
    path = Path(__file__).parent.parent / "notebooks" / "6_ppo.ipynb"
    text = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
    glossary = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    config = train_ppo.Config(batch_size=4, minibatch_size=2, ptx_size=2, max_new=4, row=16, samples=samples,
                              **settings)
    policy = random_model("causal").requires_grad_()
    model = train_ppo.FourModels(policy, networks.ScalarModel(random_model("causal")))
    pairs = [data.Example(random_tokens(3), [random_tokens(3) + [tokenizer.end]]) for _ in range(4)]
    loaded = train_ppo.Data(tokenizer, pairs, pairs, set(), pairs, SimpleNamespace(golds=lambda prompts, _: [0.0 for _ in prompts]))
    optimizer = train_ppo.build_optimizer(config, model)
    logged = {"step", "seconds", *train_ppo.train_step(config, RUN, loaded, model, optimizer, 0),
              *train_ppo.evaluate(config, RUN, loaded, model)}
    assert logged <= glossary and glossary - logged <= {"beta"}


# ---- the optimizer and its learning rate -------------------------------------------------------------------

def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    """Linear, then half a wave of a cosine; the value model's rate is the same curve."""
    config = SimpleNamespace(lr=2.0, warmup=10, steps=110)
    rates = [common.learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(2.0) and rates[60] == pytest.approx(0.55 * 2.0) and rates[110] == pytest.approx(0.2)
    assert rates[35] == pytest.approx(0.1 * 2.0 + 0.9 * 2.0 * (1 + 0.5 ** 0.5) / 2)
    assert [common.learning_rate(step, config, highest=4.0) for step in range(111)] == pytest.approx([2 * r for r in rates])


@pytest.mark.parametrize("eps", [1e-8, 1.0])
def test_adam_adds_epsilon_to_the_root_of_the_second_moment(eps, random_model):
    """Its first step on a gradient of 1 everywhere is lr / (1 + eps), for both networks."""
    model = train_ppo.FourModels(random_model("causal"), networks.ScalarModel(random_model("causal")))
    optimizer = train_ppo.build_optimizer(train_ppo.Config(adam_eps=eps, lr=0.01, value_lr=0.01), model)
    parameters = [*model.policy.parameters(), *model.value.parameters()]
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, old in zip(parameters, before):
        torch.testing.assert_close(old - p.detach(), torch.full_like(p, 0.01 / (1 + eps)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("stage", [train_pretrain, train_sft, train_rm, train_dpo])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_weight_decay_is_on_matrices_alone(stage, structure, random_model):
    """Without a gradient a step shrinks the layers' matrices by lr x weight_decay, and leaves tables and norms."""
    model = random_model(structure)
    model = networks.ScalarModel(model) if stage is train_rm else model
    optimizer = stage.build_optimizer(stage.Config(lr=0.1, weight_decay=0.5), model)
    matrices = {id(layer.weight) for layer in model.modules() if isinstance(layer, torch.nn.Linear)}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        kept = 0.95 if id(p) in matrices else 1.0
        torch.testing.assert_close(p.detach(), kept * before[name])
        assert (kept == 1.0) == (".embedding" in f".{name}" or "norm" in name or name.endswith("bias")), name

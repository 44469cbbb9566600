"""evaluate.py's figures against plain loops."""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from conftest import random_tokens
from labeller import TIE
from test_preferences import logprob_alone


def test_best_of_n_is_the_sample_that_the_reward_likes_best(monkeypatch):
    """Of n samples to each prompt, which lie side by side; a planted reward says which."""
    prompts, n = [[10], [20], [30]], 4
    written = {prompt[0] + k: reward for prompt, rewards in zip(prompts, ([3, 1, 2, 0], [0, 1, 3, 2], [1, 9, 1, 1]))
               for k, reward in enumerate(rewards)}
    def answers_of(study, model, temperature, several):
        assert temperature == 1.0 and several == [prompt for prompt in prompts for _ in range(n)]
        return [[prompt[0] + i % n] for i, prompt in enumerate(several)]
    monkeypatch.setattr(evaluate, "answers_of", answers_of)
    monkeypatch.setattr(evaluate, "rewards_of", lambda study, answers: np.array([written[a[0]] for a in answers]))
    study = SimpleNamespace(config=SimpleNamespace(best_of=n), reference=None, prompts=prompts)
    assert evaluate.best_of_n(study) == [[10], [22], [31]]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_kl_of_the_best_is_that_of_many_different_samples(n):
    """By enumeration of all n draws from m equally likely answers with m rewards: from below, nearer with m."""
    def kl_of(m: int) -> float:
        best = np.zeros(m)
        for draws in itertools.product(range(m), repeat=n):
            best[max(draws)] += m ** -n
        return float((best * np.log(best * m)).sum())
    few, many = kl_of(10), kl_of(60)
    assert few <= many <= evaluate.kl_of_best(n) + 1e-12 and many == pytest.approx(evaluate.kl_of_best(n), abs=0.03)


@pytest.fixture
def study(random_model, tokenizer) -> SimpleNamespace:
    """Three prompts with human answers, and SFT."""
    human = [random_tokens(n) + [tokenizer.end] for n in (2, 5, 3)]
    return SimpleNamespace(prompts=[random_tokens(n) for n in (3, 1, 4)], human=human, tokenizer=tokenizer,
                           reference=random_model("causal"), reward=None, device=torch.device("cpu"))


def test_the_loss_is_that_of_the_whole_vocabulary(study):
    """As in training: the tokens that are never drawn have their share of the probability."""
    nats = -sum(logprob_alone(study.reference, prompt, answer, study.tokenizer)
                for prompt, answer in zip(study.prompts, study.human))
    assert evaluate.loss_of(study, study.reference)["loss"] == pytest.approx(nats / (3 + 6 + 4), rel=1e-5)


def test_sft_at_a_lower_temperature_is_at_a_distance_from_itself(study):
    """The distance is that to SFT at temperature 1."""
    sft, answers = study.reference, study.human
    cool, warm = (evaluate.logprobs_of(study, sft, answers, temperature=temperature) for temperature in (0.5, 1.0))
    expected = float((cool - warm).mean())
    assert abs(expected) > 0.1
    assert evaluate.distance_of(study, sft, answers, 0.5)["kl"] == pytest.approx(expected, rel=1e-5)


def test_distinct_overlap_and_win_rate_equal_the_loops():
    lines = ["a b a b", "a b c", ""]
    pairs = [pair for line in lines for pair in itertools.pairwise(line.split())]
    assert evaluate.distinct(lines) == len(set(pairs)) / len(pairs) == 3 / 5
    assert evaluate.distinct(lines, 1) == 3 / 7 and evaluate.distinct([""]) == 0
    # "the" twice in one and once in the other: one in common, as is "row"; 2 of 4 and 2 of 3 words
    assert evaluate.overlap_f1("the row, the end", "Return the row") == pytest.approx(2 * 2 / (4 + 3))
    assert evaluate.overlap_f1("one thing", "another matter") == 0 and evaluate.overlap_f1("same", "Same.") == 1
    rivals = np.array([0.5, 0.5, 0.5, 0.5])
    ours = np.array([0.5 + 1.01 * TIE, 0.5 - 1.01 * TIE, 0.5 + 0.9 * TIE, 0.9])
    assert evaluate.win_rate(ours, rivals) == (1 + 0 + 0.5 + 1) / 4


def test_the_bootstrap_interval_is_the_normal_one_of_many_values():
    values = np.random.default_rng(0).normal(3.0, 2.0, 1000)
    low, high = evaluate.interval(values, seed=1)
    half = 1.96 * values.std() / math.sqrt(1000)
    assert low == pytest.approx(values.mean() - half, abs=0.02) and high == pytest.approx(values.mean() + half, abs=0.02)
    assert (low, high) == evaluate.interval(values, seed=1) != evaluate.interval(values, seed=2)

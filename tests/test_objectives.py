"""Text to pairs as properties; every loss and equation of PPO against the plain loop of its docstring."""
import math
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
import torch

import objectives
from shapes import check_shapes


def spread_is_even(counts: list[int]) -> bool:
    """Chi-square against equal frequencies, at about four standard deviations."""
    expected, freedom = sum(counts) / len(counts), len(counts) - 1
    return sum((n - expected) ** 2 / expected for n in counts) < freedom + 4 * math.sqrt(2 * freedom)


# ---- text -> (source, target) ------------------------------------------------------------------------------

def test_next_token_is_the_whole_text():
    """The source is empty, the target the text."""
    rng = np.random.default_rng(0)
    for n in (0, 1, 7):
        assert objectives.next_token(list(range(n)), rng) == objectives.Pair([], list(range(n)))


def test_prefix_lm_splits_anywhere_but_at_the_end():
    """Source + target is the text, the target is never empty, all splits are equally likely."""
    rng, splits = np.random.default_rng(0), Counter()
    for _ in range(3000):
        source, target, _ = objectives.prefix_lm(list(range(6)), rng)
        assert source + target == list(range(6)) and target
        splits[len(source)] += 1
    assert sorted(splits) == [0, 1, 2, 3, 4, 5] and spread_is_even(list(splits.values()))
    assert objectives.prefix_lm([5], rng) == objectives.Pair([], [5])


def test_random_segments_are_compositions():
    """The asked-for number of lengths, each at least 1, adding up."""
    rng = np.random.default_rng(0)
    for n_items in range(1, 12):
        for n_segments in range(1, n_items + 1):
            lengths = objectives.random_segments(n_items, n_segments, rng)
            assert len(lengths) == n_segments and min(lengths) >= 1 and sum(lengths) == n_items


def test_random_segments_are_uniform():
    """All ten compositions of 6 into 3 come up equally often."""
    rng = np.random.default_rng(0)
    drawn = Counter(tuple(objectives.random_segments(6, 3, rng).tolist()) for _ in range(5000))
    all_of_them = {(a, b - a, 6 - b) for a, b in combinations(range(1, 6), 2)}
    assert set(drawn) == all_of_them and spread_is_even(list(drawn.values()))


def test_noise_is_a_share_of_the_text():
    """Noise is density x length in spans of the mean length, rounded; a kept token before each span."""
    assert objectives.n_noise_spans(100) == (15, 5) and objectives.n_noise_spans(512) == (77, 26)
    assert objectives.n_noise_spans(100, density=0.5, mean_span=10) == (50, 5)
    for length in range(2, 200):
        for density in (0.01, 0.15, 0.5, 0.99):
            for mean_span in (1.0, 3.0, 32.0):
                n_noise, n_spans = objectives.n_noise_spans(length, density, mean_span)
                assert 1 <= n_spans <= n_noise <= length - 1 and n_spans <= length - n_noise
                if 1 <= density * length <= length - 1:
                    assert abs(n_noise - density * length) <= 0.5


SENTINELS = list(range(2000, 1900, -1))      # T5's descend: their order is that of the list, not of the ids


def restored(source: list[int], target: list[int]) -> list[int]:
    """The text: in the source, every sentinel is replaced by what follows it in the target."""
    spans, current = {}, None
    for token in target:
        if token in SENTINELS:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [token for place in source for token in spans.get(place, [place])]


@pytest.mark.parametrize("density, mean_span", [(0.15, 3.0), (0.5, 3.0), (0.3, 1.0), (0.15, 8.0), (0.9, 2.0)])
def test_span_corruption_loses_nothing(density, mean_span):
    """Source and target give the text back, with the planned noise and number of spans, in sentinel order."""
    for length in [*range(2, 60), 200]:
        for seed in range(5):
            text = np.random.default_rng(seed).integers(0, 50, length).tolist()
            rng = np.random.default_rng((length, seed))
            source, target, _ = objectives.span_corruption(text, rng, SENTINELS, density, mean_span)
            n_noise, n_spans = objectives.n_noise_spans(length, density, mean_span)
            assert restored(source, target) == text
            assert [token for token in source if token in SENTINELS] == SENTINELS[:n_spans]
            assert [token for token in target if token in SENTINELS] == SENTINELS[:n_spans + 1]
            assert len(source) == length - n_noise + n_spans and len(target) == n_noise + n_spans + 1
            assert target[0] == SENTINELS[0] and target[-1] == SENTINELS[n_spans]
            assert source[0] not in SENTINELS                             # a kept token comes first
            for tokens in (source, target):                               # no span is empty
                assert not any(a in SENTINELS and b in SENTINELS for a, b in zip(tokens, tokens[1:]))


def test_span_corruption_draws_from_its_rng_alone():
    """The same rng gives the same pair, another one another; too short a text is left whole."""
    text = list(range(100))
    pairs = [objectives.span_corruption(text, np.random.default_rng(seed), SENTINELS) for seed in (1, 1, 2)]
    assert pairs[0] == pairs[1] != pairs[2]
    for short in ([], [7]):
        pair = objectives.span_corruption(short, np.random.default_rng(0), SENTINELS)
        assert pair == objectives.Pair([], short)


def test_span_corruption_needs_a_sentinel_per_span_and_one():
    """Five spans want six sentinels: with five the error says so, in numbers."""
    objectives.span_corruption(list(range(100)), np.random.default_rng(0), SENTINELS[:6])
    with pytest.raises(ValueError, match="5 spans need 6 sentinels; there are 5"):
        objectives.span_corruption(list(range(100)), np.random.default_rng(0), SENTINELS[:5])


# ---- losses ------------------------------------------------------------------------------------------------

def logprobs_of(logits: torch.Tensor) -> list[float]:
    """log softmax of one vector, one exponential at a time."""
    total = math.log(sum(math.exp(x) for x in logits.tolist()))
    return [x - total for x in logits.tolist()]


def test_language_model_loss_equals_the_loop():
    """The sum over tokens of -log p(target), and its gradient p - [v is the target]."""
    logits, targets = (3 * torch.randn(7, 5)).requires_grad_(), torch.randint(5, (7,))
    loss = objectives.language_model_loss(logits, targets)
    expected = [-logprobs_of(row)[target] for row, target in zip(logits.detach(), targets)]
    assert loss.item() == pytest.approx(sum(expected), rel=1e-6)
    logprobs = objectives.token_logprobs(logits, targets)
    assert logprobs.tolist() == pytest.approx([-x for x in expected], abs=1e-6)
    loss.backward()
    for n in range(7):
        logprobs = logprobs_of(logits[n].detach())
        gradient = [math.exp(logprobs[v]) - int(v == targets[n]) for v in range(5)]
        assert logits.grad[n].tolist() == pytest.approx(gradient, abs=1e-6)


def test_log_probabilities_are_taken_in_fp32():
    """From bf16 logits they are those of the same numbers in fp32, not rounded to bf16."""
    logits, targets = torch.randn(6, 9).bfloat16(), torch.randint(9, (6,))
    for function in (lambda x: objectives.token_logprobs(x, targets), objectives.entropy):
        assert function(logits).dtype == torch.float32
        assert torch.equal(function(logits), function(logits.float()))


def test_entropy_equals_the_loop():
    """-sum p log p; ln V for equal logits, 0 for a certain token."""
    logits = 3 * torch.randn(6, 5)
    expected = [-sum(math.exp(x) * x for x in logprobs_of(row)) for row in logits]
    assert objectives.entropy(logits).tolist() == pytest.approx(expected, abs=1e-6)
    assert objectives.entropy(torch.full((1, 8), 2.0)).item() == pytest.approx(math.log(8), abs=1e-6)
    assert objectives.entropy(torch.tensor([[0.0, 200.0]])).item() == 0


def ranked(P: int, K: int) -> torch.Tensor:
    """Preferences (P, K, K) of rankings with ties; some prompts lack candidates, the last has ties alone."""
    gold = (torch.arange(K) + torch.arange(P)[:, None]) % 3
    gold[-1] = 1
    preference = gold[:, :, None] > gold[:, None, :]
    for p in range(1, P):
        preference[p, K - p % 3:, :] = preference[p, :, K - p % 3:] = False
    return preference


def test_pairwise_reward_loss_equals_the_loop():
    """Per prompt the mean of -log sigmoid(r_w - r_l) over its preferred pairs; 0 where there are none."""
    P, K = 5, 5
    scores, preference = torch.randn(P, K, dtype=torch.float64), ranked(P, K)
    expected = 0.0
    for p in range(P):
        pairs = [(w, l) for w in range(K) for l in range(K) if preference[p, w, l]]
        losses = [math.log(1 + math.exp(-float(scores[p, w] - scores[p, l]))) for w, l in pairs]
        expected += sum(losses) / len(losses) if losses else 0.0
    assert objectives.pairwise_reward_loss(scores, preference).item() == pytest.approx(expected, rel=1e-12)


def test_pairwise_reward_loss_ignores_absent_candidates():
    """The score at a place without candidate changes neither loss nor gradient; equal scores cost ln 2."""
    preference = ranked(5, 5)
    absent = ~(preference.any(1) | preference.any(2))
    assert absent.any() and not absent.all()
    scores = torch.randn(5, 5).masked_fill(absent, 0.0).requires_grad_()
    loss = objectives.pairwise_reward_loss(scores, preference)
    loss.backward()
    assert (scores.grad[absent] == 0).all()
    assert objectives.pairwise_reward_loss(scores.detach().masked_fill(absent, 1e6), preference) == loss
    indifferent = objectives.pairwise_reward_loss(torch.zeros(5, 5), preference)
    assert indifferent.item() == pytest.approx(4 * math.log(2))


def test_pairwise_accuracy_counts_pairs():
    """Right and all pairs: of all answers, of samples alone, of those with the human's answer (the first)."""
    P, K = 5, 4
    scores, preference = torch.randint(0, 4, (P, K)).float(), ranked(P, K)
    human = torch.tensor([True, False, True, True, False])
    counts = [[0, 0], [0, 0], [0, 0]]
    for p in range(P):
        for w in range(K):
            for l in range(K):
                with_human = bool(human[p]) and (w == 0 or l == 0)
                for kind in (0, 2 if with_human else 1):
                    counts[kind][0] += bool(preference[p, w, l] and scores[p, w] > scores[p, l])
                    counts[kind][1] += bool(preference[p, w, l])
    assert objectives.pairwise_accuracy(scores, preference, human).tolist() == counts


# ---- PPO ---------------------------------------------------------------------------------------------------

# Two rows of packed documents: the actions of each, as (first, last) position; elsewhere stands no action.
DOCUMENTS = [[(1, 4), (7, 9)], [(0, 0), (3, 8)]]
B, T = 2, 11


def actions() -> tuple[torch.Tensor, torch.Tensor]:
    """mask (B, T) and last (B, T)."""
    mask, last = torch.zeros(2, B, T, dtype=torch.bool)
    for b, row in enumerate(DOCUMENTS):
        for first, end in row:
            mask[b, first:end + 1] = last[b, end] = True
    return mask, last


def drawn() -> torch.Tensor:
    """(B, T) numbers at actions, and something large elsewhere, which nothing may depend on."""
    return torch.where(actions()[0], torch.randn(B, T, dtype=torch.float64), 1e6 * torch.randn(B, T))


def test_kl_penalised_rewards_equal_the_loop():
    """- beta (log pi - log pi_ref) at every action, the score on top at the last, nothing elsewhere."""
    mask, last = actions()
    scores, logprobs, ref = drawn(), drawn(), drawn()
    rewards = objectives.kl_penalised_rewards(scores, logprobs - ref, mask, last, beta=0.3)
    expected = torch.zeros(B, T, dtype=torch.float64)
    for b, row in enumerate(DOCUMENTS):
        for first, end in row:
            for t in range(first, end + 1):
                expected[b, t] = -0.3 * (logprobs[b, t] - ref[b, t]) + (scores[b, t] if t == end else 0.0)
    torch.testing.assert_close(rewards, expected, atol=1e-12, rtol=0)


# gamma and lambda are sums of few powers of two: then fp32 holds them, and equality is that of fp64
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.875), (0.75, 0.5), (0.75, 1.0), (1.0, 0.0)])
def test_gae_equals_the_double_sum(gamma, lam):
    """A_t = sum_l (gamma lambda)^l delta_{t+l} to the end of each document; 0 where there is no action."""
    mask, last = actions()
    rewards, values = drawn(), drawn()
    expected = torch.zeros(B, T, dtype=torch.float64)
    for b, row in enumerate(DOCUMENTS):
        for first, end in row:
            for t in range(first, end + 1):
                for later in range(t, end + 1):
                    next_value = values[b, later + 1] if later < end else 0.0
                    delta = rewards[b, later] + gamma * next_value - values[b, later]
                    expected[b, t] += (gamma * lam) ** (later - t) * delta
    advantages = objectives.gae(rewards, values, mask, last, gamma, lam)
    torch.testing.assert_close(advantages, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("gamma", [1.0, 0.75])
def test_gae_with_lambda_one_is_return_minus_value(gamma):
    """Then the values of later states cancel: A_t = sum_l gamma^l r_{t+l} - V(s_t)."""
    mask, last = actions()
    rewards, values = drawn(), drawn()
    advantages = objectives.gae(rewards, values, mask, last, gamma, lam=1.0)
    for b, row in enumerate(DOCUMENTS):
        for first, end in row:
            for t in range(first, end + 1):
                future = sum(gamma ** (later - t) * rewards[b, later] for later in range(t, end + 1))
                assert advantages[b, t].item() == pytest.approx(float(future - values[b, t]), abs=1e-12)


def test_gae_of_adjacent_documents_does_not_mix():
    """The second document starts right behind the first: its rewards and values do not reach back."""
    mask, last = torch.ones(1, 5, dtype=torch.bool), torch.tensor([[False, True, False, False, True]])
    rewards, values = torch.randn(2, 1, 5, dtype=torch.float64)
    together = objectives.gae(rewards, values, mask, last, 0.9, 0.8)
    apart = [objectives.gae(rewards[:, part], values[:, part], mask[:, part], last[:, part], 0.9, 0.8)
             for part in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(together, torch.cat(apart, dim=1), atol=0, rtol=0)


def test_whiten_equals_its_formula():
    """(x - mean) / sqrt(variance + 1e-8); the mean is put back on request; other statistics may be given."""
    x = (5 + 3 * torch.randn(9, dtype=torch.float64))
    mean = sum(x.tolist()) / 9
    var = sum((v - mean) ** 2 for v in x.tolist()) / 9
    expected = [(v - mean) / math.sqrt(var + 1e-8) for v in x.tolist()]
    assert objectives.whiten(x).tolist() == pytest.approx(expected, abs=1e-12)
    with_mean = objectives.whiten(x, shift_mean=False)
    assert with_mean.tolist() == pytest.approx([v + mean for v in expected], abs=1e-12)
    of_all = objectives.whiten(x, tuple(torch.tensor([2.0, 4.0], dtype=torch.float64)))
    assert of_all.tolist() == pytest.approx([(v - 2) / math.sqrt(4 + 1e-8) for v in x.tolist()], abs=1e-12)
    assert objectives.whiten(torch.full((3,), 7.0)).tolist() == [0, 0, 0]


def ratios_and_advantages():
    """Ratios below, inside and above the clipping range, each with positive and negative advantages."""
    ratios, both_signs = [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0], [-2.0, -0.5, 1.5]
    ratio, advantages = torch.tensor([*product(ratios, both_signs)], dtype=torch.float64).T
    old = torch.randn(len(ratio), dtype=torch.float64)
    return ratio, advantages, old, (old + ratio.log()).requires_grad_()


def test_clipped_policy_loss_equals_the_loop():
    """- min(rho A, clip(rho) A); its gradient is 0 where the clip bites and - rho A elsewhere."""
    ratio, advantages, old, logprobs = ratios_and_advantages()
    losses = objectives.clipped_policy_loss(logprobs, old, advantages, clip=0.2)
    losses.sum().backward()
    columns = (x.tolist() for x in (ratio, advantages, losses, logprobs.grad))
    for rho, a, loss, gradient in zip(*columns):
        assert loss == pytest.approx(-min(rho * a, min(max(rho, 0.8), 1.2) * a), abs=1e-12)
        bites = (a > 0 and rho > 1.2) or (a < 0 and rho < 0.8)
        assert gradient == pytest.approx(0.0 if bites else -rho * a, abs=1e-12)


def test_policy_gradient_at_ratio_one_is_reinforce():
    """Before the first update the gradient is that of - A log pi."""
    logits, taken, advantages = torch.randn(6, 5, requires_grad=True), torch.randint(5, (6,)), torch.randn(6)
    logprobs = objectives.token_logprobs(logits, taken)
    losses = objectives.clipped_policy_loss(logprobs, logprobs.detach(), advantages, 0.2)
    ppo, = torch.autograd.grad(losses.sum(), logits)
    logprobs = torch.log_softmax(logits, -1)[torch.arange(6), taken]
    reinforce, = torch.autograd.grad(-(advantages * logprobs).sum(), logits)
    torch.testing.assert_close(ppo, reinforce, atol=1e-6, rtol=0)


def test_clipped_value_loss_equals_the_loop():
    """Half the larger squared error of two: of the value, and of the value kept within eps of the old one."""
    values, old, returns = torch.randn(3, 200, dtype=torch.float64)
    losses = objectives.clipped_value_loss(values, old, returns, clip=0.3)
    branches = set()
    for v, o, r, loss in zip(values.tolist(), old.tolist(), returns.tolist(), losses.tolist()):
        kept = min(max(v, o - 0.3), o + 0.3)
        branches.add(((kept > v) - (kept < v), (kept - r) ** 2 > (v - r) ** 2))
        assert loss == pytest.approx(0.5 * max((v - r) ** 2, (kept - r) ** 2), abs=1e-12)
    assert len(branches) == 5                          # inside; clipped up or down, where it matters or not


def test_clipped_value_loss_stops_values_that_ran_ahead():
    """No gradient where the value has left the range towards the return; the full one where away from it."""
    values = torch.tensor([0.5, -0.5, 0.1], requires_grad=True)
    objectives.clipped_value_loss(values, torch.zeros(3), torch.ones(3), clip=0.2).sum().backward()
    assert values.grad.tolist() == pytest.approx([0.0, -1.5, -0.9])


def test_explained_variance_equals_its_formula():
    """1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for a constant one, less for one that misleads."""
    values, returns = torch.randn(2, 50, dtype=torch.float64)
    def variance(x): return sum((v - sum(x) / len(x)) ** 2 for v in x) / len(x)
    errors = [r - v for v, r in zip(values.tolist(), returns.tolist())]
    expected = 1 - variance(errors) / variance(returns.tolist())
    assert objectives.explained_variance(values, returns).item() == pytest.approx(expected, abs=1e-12)
    assert objectives.explained_variance(returns + 3, returns).item() == pytest.approx(1, abs=1e-12)
    constant = torch.full_like(returns, 3.0)
    assert objectives.explained_variance(constant, returns).item() == pytest.approx(0, abs=1e-12)
    assert objectives.explained_variance(-returns, returns).item() == pytest.approx(-3, abs=1e-12)
    alike = 1 + torch.tensor([0.0, 1.2e-7] * 20)                                # but for the rounding of fp32
    assert objectives.explained_variance(torch.randn(40), alike).item() == 0


def test_shapes_are_what_names_say():
    """Every suffixed local of the losses and of PPO's equations has the dimensions of its name."""
    mask, last = actions()
    logits, scores, preference = torch.randn(7, 5), torch.randn(5, 4), ranked(5, 4)
    for function, arguments in (
            (objectives.language_model_loss, (logits, torch.randint(5, (7,)))),
            (objectives.entropy, (logits,)),
            (objectives.pairwise_reward_loss, (scores, preference)),
            (objectives.pairwise_accuracy, (scores, preference, torch.ones(5) > 0)),
            (objectives.kl_penalised_rewards, (drawn(), drawn(), mask, last, 0.1)),
            (objectives.gae, (drawn(), drawn(), mask, last, 1.0, 0.9))):
        _, seen = check_shapes(function, *arguments)
        assert seen[function.__name__] >= 2

"""What is learnt: text -> (source, target), the losses, and the mathematics of PPO. Pure functions, one
equation each.

An objective turns the tokens of a text into a pair `(source, target)`; a structure lays the pair out and
masks it (data.py, masks.py). A loss turns a model's outputs into a number; nothing here calls a model.
Tensors of shape (B, T) are packed rows: several documents in one row, told apart by the masks that are passed
in.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[list[int], list[int]]


# ---- text -> (source, target) ------------------------------------------------------------------------------

def next_token(text: list[int], rng: np.random.Generator) -> Pair:
    """The empty source and the whole text: p(x) = prod_t p(x_t | x_<t) (GPT: Radford et al. 2018, eq. 1)."""
    return [], text


def prefix_lm(text: list[int], rng: np.random.Generator) -> Pair:
    """Split at a uniformly drawn point: the rest is predicted from the beginning (Raffel et al. 2020, section
    3.2.3).

    At least one token stays in the target, so a text of one token has the empty source.
    """
    split = int(rng.integers(0, max(1, len(text))))
    return text[:split], text[split:]


def random_segments(n_items: int, n_segments: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths >= 1 of n_segments segments that together hold n_items, all compositions equally likely."""
    cuts = np.sort(rng.choice(n_items - 1, n_segments - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], cuts, [n_items])))


def n_noise_spans(length: int, density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """Number of noise tokens and of noise spans in a text of that length. The first span follows >= 1 kept
    token.
    """
    n_noise = min(max(round(length * density), 1), length - 1)
    n_spans = min(max(round(n_noise / mean_span), 1), n_noise, length - n_noise)
    return n_noise, n_spans


def span_corruption(text: list[int], rng: np.random.Generator, sentinels: list[int],
                    density: float = 0.15, mean_span: float = 3.0) -> Pair:
    """T5's denoising (Raffel et al. 2020, section 3.1.4 and figure 2).

    15 % of the tokens are noise, in spans of mean length 3. Noise and kept tokens are each cut into as many
    random segments and interleaved, a kept one first. Source: each noise span replaced by its sentinel.
    Target: every sentinel followed by its span, and the next sentinel at the end. Source and target together
    give the text back. A text of fewer than two tokens cannot be corrupted: it becomes the target of an empty
    source. Raises ValueError when the text needs more spans than there are sentinels.
    """
    if len(text) < 2:
        return [], text
    n_noise, n_spans = n_noise_spans(len(text), density, mean_span)
    if n_spans + 1 > len(sentinels):
        raise ValueError(f"{n_spans} spans need {n_spans + 1} sentinels; there are {len(sentinels)}: "
                         "shorten the context")
    kept, noise = random_segments(len(text) - n_noise, n_spans, rng), random_segments(n_noise, n_spans, rng)
    source, target, at = [], [], 0
    for n_kept, n_span, sentinel in zip(kept, noise, sentinels):
        source += text[at:at + n_kept] + [sentinel]
        target += [sentinel] + text[at + n_kept:at + n_kept + n_span]
        at += n_kept + n_span
    return source, target + [sentinels[n_spans]]


# ---- losses ------------------------------------------------------------------------------------------------

def token_logprobs(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """log p(target_n) = logit[target_n] - logsumexp(logits), in fp32 whatever the model's dtype. (N,)"""
    return -F.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def language_model_loss(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """L = - sum over the N counted tokens of weight_n log p(target_n). A sum: divide it by the step's whole
    weight.

    Counted are, in next-token pretraining, all tokens; in SFT the response and its end token (Ouyang et al.
    2022, section 3.5). Dividing by anything else, for instance each micro-batch by its own count, would weigh
    the tokens of short micro-batches more than those of long ones.
    """
    logprobs_N = token_logprobs(logits_NV, targets_N)
    return -(logprobs_N if weights_N is None else logprobs_N * weights_N).sum()


def pairwise_reward_loss(scores_PK: Tensor, preference_PKK: Tensor) -> Tensor:
    """L = - sum_prompts 1/n_pairs sum_{(w, l)} log sigmoid(r_w - r_l) (Ouyang et al. 2022, eq. 1).

    scores (P, K): one per candidate of each prompt. preference (P, K, K) bool: [p, w, l] is True where
    candidate w is preferred to l; ties are False both ways. All pairs of a prompt count together as one
    example, as in the paper: its candidates share a forward pass, and a candidate that occurs in K - 1 pairs
    is not learnt K - 1 times. A sum over prompts: divide it by the prompts of the whole step.
    """
    margin_PKK = scores_PK[:, :, None] - scores_PK[:, None, :]
    losses_PKK = torch.where(preference_PKK, -F.logsigmoid(margin_PKK), 0.0)
    n_pairs_P = preference_PKK.sum((1, 2)).clamp(min=1)
    return (losses_PKK.sum((1, 2)) / n_pairs_P).sum()


def pairwise_accuracy(scores_PK: Tensor, preference_PKK: Tensor, human_P: Tensor) -> Tensor:
    """[[right, all], ...] numbers of pairs (3, 2): all pairs, sample against sample, human (answer 0) against
    sample.
    """
    right_PKK = preference_PKK & (scores_PK[:, :, None] > scores_PK[:, None, :])
    with_human_PKK = torch.zeros_like(preference_PKK)
    with_human_PKK[:, 0, :] = with_human_PKK[:, :, 0] = human_P[:, None]
    kinds = (torch.ones_like(with_human_PKK), ~with_human_PKK, with_human_PKK)
    return torch.stack([torch.stack([(x & kind).sum() for x in (right_PKK, preference_PKK)])
                        for kind in kinds])


# ---- PPO (Schulman et al. 2017) on token sequences ---------------------------------------------------------
# An action is a response token. Position t of a packed row holds the state before the action (the tokens up
# to t); the action is targets[t]; mask_BT is True at the positions of actions. Padding is never looked at.

def entropy(logits_NV: Tensor) -> Tensor:
    """H_n = - sum_v p_v log p_v, in nats. (N,)"""
    logprobs_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    return torch.special.entr(logprobs_NV.exp()).sum(-1)          # entr(p) = - p log p, and 0 where p is 0


def kl_penalised_rewards(scores_BT: Tensor, logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor,
                         last_BT: Tensor, beta: float) -> Tensor:
    """r_t = - beta (log pi(a_t) - log pi_ref(a_t)) + [t is the last action] score (Ouyang et al. 2022, eq.
    2).

    The score of the whole answer is paid at its last action; the divergence from the reference is charged at
    each. The difference of log-probabilities is the estimator k1 of the KL: unbiased, and negative for some
    tokens.
    """
    kl_BT = logprobs_BT - ref_logprobs_BT
    return torch.where(mask_BT, -beta * kl_BT, 0.0) + torch.where(last_BT, scores_BT, 0.0)


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, last_BT: Tensor, gamma: float,
        lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), computed from the last action to the
    first:

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)          A_t = delta_t + gamma lambda A_{t+1}

    After the last action of a document V and A are 0, so nothing flows between the documents of a packed row.
    """
    advantages_BT = torch.zeros_like(rewards_BT)
    next_value = next_advantage = torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(rewards_BT.shape[1])):
        goes_on = (mask_BT[:, t] & ~last_BT[:, t]).to(values_BT.dtype)
        delta = rewards_BT[:, t] + gamma * goes_on * next_value - values_BT[:, t]
        next_advantage = torch.where(mask_BT[:, t], delta + gamma * lam * goes_on * next_advantage, 0.0)
        next_value = torch.where(mask_BT[:, t], values_BT[:, t], 0.0)
        advantages_BT[:, t] = next_advantage
    return advantages_BT


def whiten(x: Tensor, mean_and_var: tuple[Tensor, Tensor] | None = None, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8); shift_mean=False puts the mean back (for rewards). x: 1-D, counted
    entries only.

    mean_and_var: those of all ranks together, where there are several.
    """
    mean, var = mean_and_var or (x.mean(), x.var(unbiased=False))
    whitened = (x - mean) * torch.rsqrt(var + 1e-8)
    return whitened if shift_mean else whitened + mean


def clipped_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """- min(rho A, clip(rho, 1 - eps, 1 + eps) A) with rho = pi / pi_old (Schulman et al. 2017, eq. 7), per
    token.
    """
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) per token (PPO's reference code,
    2017).
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R): 1 is a perfect critic, 0 one that knows the mean alone. 1-D, counted entries
    only.

    Returns that are all alike leave nothing to explain: 0.
    """
    variance = returns.var(unbiased=False)
    unexplained = (returns - values).var(unbiased=False) / variance.clamp(min=1e-12)
    return torch.where(variance > 0, 1 - unexplained, 0.0)

"""What is learnt: text -> (source, target), the losses, and the mathematics of PPO. Pure functions, one
equation each.

An objective turns the tokens of a text into a pair `(source, target)`; a structure lays the pair out and
masks it (data.py, masks.py). A loss turns a model's outputs into a number; nothing here calls a model.
Tensors of shape (B, T) are packed rows: several documents in one row, told apart by the masks that are passed
in.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# ---- text -> (source, target) ------------------------------------------------------------------------------
# An objective is a function (text, rng, special tokens, constants of its paper) -> Pair. With the tokens
# bound by functools.partial it is called as objective(text, rng).


class Pair(NamedTuple):
    """blanks, of GLM alone: for each span of the target, in its order, the index in `source` of its mask."""
    source: list[int]
    target: list[int]
    blanks: tuple[int, ...] = ()


def next_token(text: list[int], rng: np.random.Generator) -> Pair:
    """The empty source and the whole text: p(x) = prod_t p(x_t | x_<t) (GPT: Radford et al. 2018, eq. 1)."""
    return Pair([], text)


def prefix_lm(text: list[int], rng: np.random.Generator) -> Pair:
    """Split at a uniformly drawn point: the rest is predicted from the beginning (Raffel et al. 2020, section
    3.2.3).

    At least one token stays in the target, so a text of one token has the empty source.
    """
    split = int(rng.integers(0, max(1, len(text))))
    return Pair(text[:split], text[split:])


def random_segments(n_items: int, n_segments: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths >= 1 of n_segments segments that together hold n_items, all compositions equally likely."""
    cuts = np.sort(rng.choice(n_items - 1, n_segments - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], cuts, [n_items])))


def n_noise_spans(length: int, density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """Number of noise tokens and of noise spans in a text of that length. Each span follows a kept token."""
    n_noise = min(max(round(length * density), 1), length - 1)
    n_spans = min(max(round(n_noise / mean_span), 1), n_noise, length - n_noise)
    return n_noise, n_spans


def span_corruption(text: list[int], rng: np.random.Generator, sentinels: list[int],
                    density: float = 0.15, mean_span: float = 3.0) -> Pair:
    """T5's denoising (Raffel et al. 2020, section 3.3.4 and figure 2).

    15 % of the tokens are noise, in spans of mean length 3. Noise and kept tokens are each cut into as many
    random segments and interleaved, a kept one first: noise ends the text, and a single span is its end.
    Source: each noise span replaced by its sentinel. Target: every sentinel followed by its span, and the
    next sentinel at the end. Source and target together give the text back. A text of fewer than two tokens
    cannot be corrupted: it becomes the target of an empty source. Raises ValueError when the text needs more
    spans than there are sentinels. The paper's other rates (table 6, of single tokens: 10, 25, 50 %) and mean
    lengths (table 7: 2, 5, 10) are the last two arguments.
    """
    if len(text) < 2:
        return Pair([], text)
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
    return Pair(source, target + [sentinels[n_spans]])


def raw_length(input_length: int, density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """(raw, target): how many tokens of text fill an input of that length without padding, and how long the
    target then is (T5's code, `random_spans_helper`).

    The input holds the source and one token more: <bos> here, the end token in T5. The target ends with the
    closing sentinel here, with the end token in T5's code. It may not grow longer than the input.
    """
    def lengths(raw: int) -> tuple[int, int]:
        n_noise, n_spans = n_noise_spans(raw, density, mean_span)
        return raw - n_noise + n_spans + 1, n_noise + n_spans + 1

    raw = input_length - 1
    while max(lengths(raw + 1)) <= input_length:
        raw += 1
    return raw, lengths(raw)[1]


# BART and GLM: spans of Poisson length, each replaced by one mask

def poisson_spans(length: int, n_noise: int, mean_span: float, shortest: int,
                  rng: np.random.Generator) -> list[tuple[int, int]]:
    """(start, end) of spans that hold n_noise of the tokens, from left to right.

    Lengths are drawn from Poisson(mean_span), those below `shortest` again; the last is cut to fit, as in
    BART's code (GLM's lets it run over). Between two spans lies at least one kept token, as in GLM's code;
    all such places are equally likely. Spans that find no kept token between them are given up: those of a
    tiny text, or of a share far above one half.
    """
    lengths, missing = [], n_noise
    while missing:
        drawn = min(int(rng.poisson(mean_span)), missing)
        if drawn >= shortest:
            lengths.append(drawn)
            missing -= drawn
    # subtle: in the order drawn, the one that was cut would always be the last of the text
    lengths = rng.permutation(lengths).astype(int)[:length - n_noise + 1]
    n_kept = length - int(lengths.sum())
    kept_before = np.sort(rng.choice(n_kept + 1, len(lengths), replace=False))
    ends = kept_before + np.cumsum(lengths)
    return list(zip((ends - lengths).tolist(), ends.tolist()))


def blank_out(text: list[int], spans: list[tuple[int, int]], mask: int) -> tuple[list[int], list[int]]:
    """(the text with one mask in place of each span, the index of each mask in it)."""
    source, places, at = [], [], 0
    for start, end in spans:
        source += text[at:start]
        places.append(len(source))
        source.append(mask)
        at = end
    return source + text[at:], places


def sentences(text: list[int], ends: set[int]) -> list[tuple[int, int]]:
    """(start, end) of the sentences; one goes on through all the tokens of `ends` that close it."""
    starts = [i for i in range(1, len(text)) if text[i - 1] in ends and text[i] not in ends]
    return list(zip([0] + starts, starts + [len(text)]))


def text_infilling(text: list[int], rng: np.random.Generator, mask: int) -> Pair:
    """BART's best noise (Lewis et al. 2020, section 2.2): Poisson(3) spans, each replaced by one mask.

    30 % of the tokens (section 5.1), rounded up; a span of length 0 inserts a mask where nothing is missing.
    Target: the text. The paper says lambda = 3; the arguments that its authors posted say 3.5, and replace a
    tenth of the masks by random tokens, which is left out here.
    """
    spans = poisson_spans(len(text), math.ceil(0.3 * len(text)), 3.0, 0, rng)
    return Pair(blank_out(text, spans, mask)[0], text)


def sentence_permutation(text: list[int], rng: np.random.Generator, ends: set[int]) -> Pair:
    """The sentences in random order (Lewis et al. 2020, section 2.2). ends: tokens that end a sentence."""
    spans = sentences(text, ends)
    return Pair([token for i in rng.permutation(len(spans)) for token in text[slice(*spans[i])]], text)


def bart(text: list[int], rng: np.random.Generator, mask: int, ends: set[int]) -> Pair:
    """What BART was trained with: its sentences permuted, then infilling (Lewis et al. 2020, section 5.1)."""
    permuted = sentence_permutation(text, rng, ends).source
    return Pair(text_infilling(permuted, rng, mask).source, text)


def token_masking(text: list[int], rng: np.random.Generator, mask: int, density: float = 0.15) -> Pair:
    """Each token is masked with probability density: BERT's 15 %, as Lewis et al. 2020, section 2.2, name no
    rate.
    """
    hit = rng.random(len(text)) < density
    return Pair([mask if h else token for token, h in zip(text, hit.tolist())], text)


def token_deletion(text: list[int], rng: np.random.Generator, density: float = 0.15) -> Pair:
    """Tokens are left out, and no mask says where (Lewis et al. 2020, section 2.2; rate as above)."""
    hit = rng.random(len(text)) < density
    return Pair([token for token, h in zip(text, hit.tolist()) if not h], text)


def document_rotation(text: list[int], rng: np.random.Generator) -> Pair:
    """The text turned round to begin at a uniformly drawn token (Lewis et al. 2020, section 2.2)."""
    start = int(rng.integers(0, max(1, len(text))))
    return Pair(text[start:] + text[:start], text)


def keep_end(text: list[int], rng: np.random.Generator, noise, end: int) -> Pair:
    """BART's noises (noise: one of the above) spare a final end token: it would give away the last sentence,
    or where a rotated text began.
    """
    if text[-1:] != [end]:
        return noise(text, rng)
    source, target, _ = noise(text[:-1], rng)
    return Pair(source + [end], target + [end])


def glm_pair(text: list[int], rng: np.random.Generator, spans: list[tuple[int, int]], mask: int, sop: int,
             eop: int) -> Pair:
    """GLM's autoregressive blank infilling (Du et al. 2022, section 2.1.1), for given blanks.

    Source: the text, one mask in place of each span. Target: the spans in random order, each between sop and
    eop (the paper's [START] and [END]), for instance

        target   sop s1 s2 eop sop t1 eop
        input    sop s1 s2     sop t1          without eop: nothing follows it
        labels       s1 s2 eop     t1 eop      without sop: nobody predicts it

    so the layout has input and labels as two filters of one list. Pair.blanks gives each span's first
    position (section 2.2.1): that of its mask in the source.
    """
    source, places = blank_out(text, spans, mask)
    order = rng.permutation(len(spans)).tolist()
    target = [token for i in order for token in (sop, *text[slice(*spans[i])], eop)]
    return Pair(source, target, tuple(places[i] for i in order))


def glm_spans(text: list[int], rng: np.random.Generator, mask: int, sop: int, eop: int,
              density: float = 0.15, mean_span: float = 3.0) -> Pair:
    """[MASK]: short spans, Poisson(3), in all at least 15 % of the tokens (Du et al. 2022, section 2.1.1)."""
    spans = poisson_spans(len(text), math.ceil(density * len(text)), mean_span, 1, rng)
    return glm_pair(text, rng, spans, mask, sop, eop)


def glm_sentences(text: list[int], rng: np.random.Generator, smask: int, sop: int, eop: int, ends: set[int],
                  density: float = 0.15) -> Pair:
    """[sMASK]: whole sentences, one after another until 15 % of the tokens are blanks (section 2.1.2)."""
    spans, chosen, n_noise = sentences(text, ends), [], 0
    for i in rng.permutation(len(spans)).tolist():
        chosen.append(spans[i])
        n_noise += spans[i][1] - spans[i][0]
        if n_noise >= density * len(text):
            break
    return glm_pair(text, rng, sorted(chosen), smask, sop, eop)


def glm_document(text: list[int], rng: np.random.Generator, gmask: int, sop: int, eop: int,
                 shortest: float = 0.5) -> Pair:
    """[gMASK]: the end of the text, uniformly 50 to 100 % of it (Du et al. 2022, section 2.1.2).

    The paper leaves open where its one span lies; GLM-130B's is the end, and so is ours. GLM's code puts half
    of them anywhere, and no eop after those at the end. The empty text has an empty blank.
    """
    least = min(len(text), max(1, math.ceil(shortest * len(text))))
    start = len(text) - int(rng.integers(least, len(text) + 1))
    return glm_pair(text, rng, [(start, len(text))], gmask, sop, eop)


def glm_10b(text: list[int], rng: np.random.Generator, mask: int, smask: int, gmask: int, sop: int, eop: int,
            ends: set[int]) -> Pair:
    """GLM-10B's mixture (its published configuration's shares): 50 % [MASK], 30 % [sMASK], 20 % [gMASK] of at
    least a quarter.
    """
    draw = rng.random()
    if draw < 0.5:
        return glm_spans(text, rng, mask, sop, eop)
    if draw < 0.8:
        return glm_sentences(text, rng, smask, sop, eop, ends)
    return glm_document(text, rng, gmask, sop, eop, shortest=0.25)


def glm_130b(text: list[int], rng: np.random.Generator, mask: int, gmask: int, sop: int, eop: int) -> Pair:
    """GLM-130B's mixture (Zeng et al. 2023, section 2.2): 30 % [MASK], 70 % [gMASK] of any length."""
    if rng.random() < 0.3:
        return glm_spans(text, rng, mask, sop, eop)
    return glm_document(text, rng, gmask, sop, eop, shortest=0.0)


# UL2's denoisers: mode, density r, mean span mu (None: one span, at the end of the text)
UL2 = (("R", 0.15, 3), ("R", 0.15, 8), ("S", 0.25, None),
       ("X", 0.5, 3), ("X", 0.5, 8), ("X", 0.15, 64), ("X", 0.5, 64))
U_PALM = 4 * (("S", 0.5, None),) + 2 * (("R", 0.15, 3),) + (("X", 0.15, 32), ("X", 0.5, 3))


def ul2(text: list[int], rng: np.random.Generator, sentinels: list[int], modes: dict[str, int],
        denoisers: tuple = UL2) -> Pair:
    """UL2's mixture of denoisers (Tay et al. 2022a, section 3.1.2 and table 1), its rows equally likely.

    R is T5's span corruption, X the same with half of the text or long spans missing, S prefix language
    modelling: the last tokens of the text, uniformly many around their mean r L, are the target as they are,
    without a sentinel (as in the appendix's code, whose mean is L / 2). The token of the mode comes first in
    the source. U_PALM is UL2R's mixture (Tay et al. 2022b, section 2.3): S 50 %, R 25 %, X 25 %, "mean length
    of 32 OR a corruption rate of up to 50 %". A text of fewer than two tokens is left whole behind its mode;
    too few sentinels: see span_corruption.
    """
    mode, density, mean_span = denoisers[int(rng.integers(len(denoisers)))]
    if mean_span is None:
        n = int(rng.integers(1, max(2, round(2 * density * len(text)))))
        pair = Pair(text[:-n], text[-n:])
    else:
        pair = span_corruption(text, rng, sentinels, density, mean_span)
    return Pair([modes[mode]] + pair.source, pair.target)


# ---- losses ------------------------------------------------------------------------------------------------

def token_logprobs(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """log p(target_n) = logit[target_n] - logsumexp(logits), in fp32 whatever the model's dtype. (N,)"""
    return -F.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def language_model_loss(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """L = - sum over the N counted tokens of weight_n log p(target_n). A sum: divide it by the step's whole
    weight.

    Counted are, in next-token pretraining, all tokens; in SFT the response, its end token, and the prompt's
    tokens times source_weight (0: not at all). Dividing by anything else, for instance each micro-batch by
    its own count, would weigh the tokens of short micro-batches more than those of long ones.
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
    kinds = torch.stack((torch.ones_like(with_human_PKK), ~with_human_PKK, with_human_PKK))
    return torch.stack([(kinds & x).sum((1, 2, 3)) for x in (right_PKK, preference_PKK)], dim=1)


def correlation(x_N: Tensor, y_N: Tensor) -> Tensor:
    """Pearson's r = cov(x, y) / (std x std y), -1 to 1; 0 where one of the two does not vary."""
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    scale = (x_N ** 2).sum().sqrt() * (y_N ** 2).sum().sqrt()
    return torch.where(scale > 0, (x_N * y_N).sum() / scale, 0.0)


# ---- PPO (Schulman et al. 2017) on token sequences ---------------------------------------------------------
# An action is a response token. Position t of a packed row holds the state before the action (the tokens up
# to t); the action is targets[t]; mask_BT is True at the positions of actions. Padding is never looked at.

def entropy(logits_NV: Tensor) -> Tensor:
    """H_n = - sum_v p_v log p_v, in nats. (N,)"""
    logprobs_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    return torch.special.entr(logprobs_NV.exp()).sum(-1)          # entr(p) = - p log p, and 0 where p is 0


def kl_penalised_rewards(scores_BT: Tensor, kl_BT: Tensor, mask_BT: Tensor, last_BT: Tensor,
                         beta: float) -> Tensor:
    """r_t = - beta kl_t + [t is the last action] score, kl_t one of kl_estimates (Ouyang et al. 2022, eq. 2,
    with k1 = log pi(a_t) - log pi_ref(a_t)).

    The score of the whole answer is paid at its last action; the divergence from the reference is charged at
    each.
    """
    return torch.where(mask_BT, -beta * kl_BT, 0.0) + torch.where(last_BT, scores_BT, 0.0)


def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(k1, k2, k3): KL(pi || ref) from the log-probabilities of tokens drawn from pi (Schulman 2020,
    "Approximating KL divergence"). With d = log pi - log ref:

        k1 = d                 unbiased; negative for some tokens, so its mean is noisy
        k2 = d^2 / 2           never negative, little variance; biased, by terms of third order in d
        k3 = exp(-d) - 1 + d   unbiased and never negative; little variance where pi and ref are close

    As a penalty inside the reward, k1 gives the gradient of the KL. k2 and k3 do not: near the reference
    theirs vanish (k3's is that of KL(pi || ref) - KL(ref || pi)), so they hold the policy back only when it
    has gone. As a loss of its own k1 gives no gradient on average, k2 the KL's, k3 that of KL(ref || pi).
    """
    k1 = logprobs - ref_logprobs
    return k1, 0.5 * k1 ** 2, torch.expm1(-k1) + k1


def adapted_beta(beta: float, kl: float, target: float, gain: float = 0.1) -> float:
    """The next iteration's beta (Ziegler et al. 2019, section 2.2), so that the KL of an answer stays at
    target:

        e = clip((KL - target) / target, -0.2, 0.2)          beta <- beta (1 + gain e)
    """
    error = min(max((kl - target) / target, -0.2), 0.2)
    return beta * (1 + gain * error)


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, last_BT: Tensor, gamma: float,
        lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), computed from the last action to the
    first:

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)          A_t = delta_t + gamma lambda A_{t+1}

    After the last action of a document V and A are 0, so nothing flows between the documents of a packed row.
    """
    goes_on_BT = (mask_BT & ~last_BT).to(values_BT.dtype)
    next_values_BT = F.pad(torch.where(mask_BT, values_BT, 0.0)[:, 1:], (0, 1))
    deltas_BT = torch.where(mask_BT, rewards_BT + gamma * goes_on_BT * next_values_BT - values_BT, 0.0)
    advantages_BT, advantage = torch.zeros_like(rewards_BT), torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(rewards_BT.shape[1])):
        advantages_BT[:, t] = advantage = deltas_BT[:, t] + gamma * lam * goes_on_BT[:, t] * advantage
    return advantages_BT


def whiten(x: Tensor, mean_and_var: tuple[Tensor, Tensor] | None = None, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8); shift_mean=False puts the mean back (for rewards).

    mean_and_var: those of the entries that count, over all ranks; None: of all of x.

    Rewards r with mean m and deviation s become (r - m) / s + m, s times which is r + m (s - 1): what is
    maximised has m (s - 1) for every token in it, a bonus or a malus on length (tests/test_ppo_proofs.py).
    """
    mean, var = mean_and_var or (x.mean(), x.var(unbiased=False))
    whitened = (x - mean) * torch.rsqrt(var + 1e-8)
    return whitened if shift_mean else whitened + mean


def leave_one_out(rewards_PK: Tensor) -> Tensor:
    """RLOO: A_k = R_k - 1/(K - 1) sum_{j != k} R_j, no critic (Kool et al. 2019; Ahmadian et al. 2024).

    rewards (P, K): those of K answers to each of P prompts, each the sum over its answer, KL penalty
    included. The baseline does not depend on answer k, so the gradient stays unbiased, as long as the policy
    is the one that sampled. All tokens of an answer share its A. (The papers have plain REINFORCE on whole
    answers; train_ppo.py puts A into the clipped loss of every token, for its second epoch.)
    """
    K = rewards_PK.shape[1]
    return rewards_PK - (rewards_PK.sum(1, keepdim=True) - rewards_PK) / (K - 1)


def group_relative(rewards_PK: Tensor) -> Tensor:
    """GRPO: A_k = (R_k - mean R) / std R over the K answers to a prompt (Shao et al. 2024, section 4.1.2).

    The paper does not say which std, nor what happens to K equal rewards: here it is that of a sample
    (K - 1), and 1e-4 is added as in TRL. The mean holds R_k itself, so without the std this is RLOO's A times
    (K - 1) / K; the std weighs prompts whose answers differ little as much as all others. (The paper averages
    the loss over each answer's tokens first; train_ppo.py averages over all tokens of a minibatch.)
    """
    centred_PK = rewards_PK - rewards_PK.mean(1, keepdim=True)
    return centred_PK / (rewards_PK.std(1, keepdim=True) + 1e-4)


def clipped_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """- min(rho A, clip(rho, 1 - eps, 1 + eps) A) with rho = pi / pi_old (Schulman et al. 2017, eq. 7), per
    token.
    """
    ratio = (logprobs - old_logprobs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) per token (PPO's 2017 reference code)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R): 1 is a perfect critic, 0 one that knows the mean alone. 1-D, counted entries
    only.

    Returns that are all alike, but for the rounding of fp32, leave nothing to explain: 0.
    """
    variance, rounding = returns.var(unbiased=False), 1e-12 * (values ** 2 + returns ** 2).mean()
    return torch.where(variance > rounding, 1 - (returns - values).var(unbiased=False) / variance, 0.0)


# ---- DPO: PPO's optimum from the comparisons themselves ----------------------------------------------------

def dpo_loss(chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_rejected_P: Tensor,
             beta: float) -> Tensor:
    """- log sigmoid(beta (log pi(w)/ref(w) - log pi(l)/ref(l))) per pair (Rafailov et al. 2023, eq. 7). (P,)

    chosen and rejected: log-probabilities of whole answers w and l to a prompt, sums over their tokens, under
    pi and under ref. The optimum of PPO's objective is pi* = ref exp(r / beta) / Z, so that beta log pi*/ref
    is r up to a constant of the prompt: the reward loss of the pair (pairwise_reward_loss), with that put in
    for r, needs no reward model and no samples.
    """
    return -F.logsigmoid(beta * ((chosen_P - ref_chosen_P) - (rejected_P - ref_rejected_P)))

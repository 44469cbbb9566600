"""The denoising objectives: each is undone here, and drawn as its paper says.

`pytest -s -k picture tests/test_denoising.py` prints one text before and after each of them.
"""
import math
from collections import Counter
from functools import partial
from itertools import combinations, permutations

import numpy as np
import pytest

import objectives
from objectives import Pair
from test_objectives import SENTINELS, restored, spread_is_even

END, MASK, SMASK, GMASK, SOP, EOP = range(3000, 3006)
MODES = {"R": 3010, "S": 3011, "X": 3012}
STOPS = {7, 8}                                    # the tokens that end a sentence
glm = dict(sop=SOP, eop=EOP)

OBJECTIVES = {
    "next_token": objectives.next_token,
    "prefix_lm": objectives.prefix_lm,
    "span_corruption": partial(objectives.span_corruption, sentinels=SENTINELS),
    "text_infilling": partial(objectives.text_infilling, mask=MASK),
    "sentence_permutation": partial(objectives.sentence_permutation, ends=STOPS),
    "bart": partial(objectives.bart, mask=MASK, ends=STOPS),
    "token_masking": partial(objectives.token_masking, mask=MASK),
    "token_deletion": objectives.token_deletion,
    "document_rotation": objectives.document_rotation,
    "glm_spans": partial(objectives.glm_spans, mask=MASK, **glm),
    "glm_sentences": partial(objectives.glm_sentences, smask=SMASK, ends=STOPS, **glm),
    "glm_document": partial(objectives.glm_document, gmask=GMASK, **glm),
    "glm_10b": partial(objectives.glm_10b, mask=MASK, smask=SMASK, gmask=GMASK, ends=STOPS, **glm),
    "glm_130b": partial(objectives.glm_130b, mask=MASK, gmask=GMASK, **glm),
    "ul2": partial(objectives.ul2, sentinels=SENTINELS, modes=MODES),
    "u_palm": partial(objectives.ul2, sentinels=SENTINELS, modes=MODES, denoisers=objectives.U_PALM)}


# ---- the way back ------------------------------------------------------------------------------------------

def glm_restored(pair: Pair) -> list[int]:
    """The text: each span of the target, sop ... eop, goes to the place in the source that blanks names."""
    spans, at = {}, 0
    for place in pair.blanks:
        assert pair.target[at] == SOP and pair.source[place] in (MASK, SMASK, GMASK)
        end = pair.target.index(EOP, at)
        spans[place] = pair.target[at + 1:end]
        at = end + 1
    assert at == len(pair.target) and len(spans) == len(pair.blanks)          # every span has its own mask
    return [token for i, place in enumerate(pair.source) for token in spans.get(i, [place])]


def ul2_restored(pair: Pair) -> list[int]:
    """Behind the mode token: T5's pair, or for S the beginning and the rest."""
    mode, *source = pair.source
    return source + pair.target if mode == MODES["S"] or not source else restored(source, pair.target)


BACK = {"next_token": lambda pair: pair.source + pair.target,
        "prefix_lm": lambda pair: pair.source + pair.target,
        "span_corruption": lambda pair: restored(*pair[:2]) if pair.source else pair.target,
        **{name: glm_restored for name in OBJECTIVES if name.startswith("glm")},
        "ul2": ul2_restored, "u_palm": ul2_restored}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_source_and_target_give_the_text_back(name):
    """For every length, the shortest included; where the target is not the text itself, by the inverse."""
    back = BACK.get(name, lambda pair: pair.target)
    for length in [*range(40), 100, 255]:
        for seed in range(20):
            text = np.random.default_rng(seed).integers(0, 50, length).tolist()
            before = list(text)
            pair = OBJECTIVES[name](text, np.random.default_rng((length, seed)))
            assert back(pair) == text == before                    # nor did the objective change its argument
            assert all(type(token) is int for tokens in pair for token in tokens)
            assert isinstance(pair, Pair) and (name.startswith("glm") or pair.blanks == ())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_draws_from_its_rng_alone(name):
    """The same generator gives the same pair; others give others, but for next-token prediction."""
    text = np.random.default_rng(0).integers(0, 50, 200).tolist()
    once, again, *others = (OBJECTIVES[name](text, np.random.default_rng(seed)) for seed in (0, 0, *range(9)))
    assert once == again and (name == "next_token" or any(other != once for other in others))


# ---- T5 ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, raw, target", [
    ((512, 0.15, 3), 568, 114), ((256, 0.15, 3), 284, 58), ((128, 0.15, 3), 141, 29),
    ((512, 0.5, 3), 766, 512), ((512, 0.15, 64), 600, 92), ((512, 0.5, 64), 1006, 512)])
def test_raw_length_is_that_of_t5(arguments, raw, target):
    """The numbers of random_spans_helper."""
    assert objectives.raw_length(*arguments) == (raw, target)


def test_raw_length_leaves_no_padding():
    """A text of that length fills input and target exactly; one token more is too long for one of them."""
    def lengths(n, density, mean_span):
        pair = objectives.span_corruption(list(range(n)), np.random.default_rng(0), list(range(-999, 0)),
                                          density, mean_span)
        return 1 + len(pair.source), len(pair.target)
    for input_length in (32, 100, 512):
        for density in (0.1, 0.15, 0.5):
            for mean_span in (2, 3, 10):
                raw, target = objectives.raw_length(input_length, density, mean_span)
                assert lengths(raw, density, mean_span)[1] == target <= input_length
                assert input_length - 1 <= lengths(raw, density, mean_span)[0] <= input_length
                assert max(lengths(raw + 1, density, mean_span)) > input_length


# ---- spans of Poisson length -------------------------------------------------------------------------------

def test_spans_hold_the_share_and_do_not_touch():
    """Ordered, within the text, a kept token between any two, exactly the wanted number of tokens inside."""
    for shortest in (0, 1):
        for length in (8, 30, 200):
            for n_noise in (1, length // 7 + 1, length // 2):
                rng = np.random.default_rng((length, n_noise))
                spans = objectives.poisson_spans(length, n_noise, 3.0, shortest, rng)
                assert all(0 <= start <= end <= length and end - start >= shortest for start, end in spans)
                assert all(end < start for (_, end), (start, _) in zip(spans, spans[1:]))
                n_given_up = n_noise - sum(end - start for start, end in spans)
                assert n_given_up == 0 or (shortest == 0 and length == 8 and n_given_up > 0)


def test_spans_without_room_are_given_up():
    """Nine tenths in short spans cannot lie apart: as many spans as there are places, and no endless loop."""
    spans = objectives.poisson_spans(100, 90, 3.0, 1, np.random.default_rng(0))
    assert len(spans) == 11 and all(end < start for (_, end), (start, _) in zip(spans, spans[1:]))
    for length in (0, 1, 2):
        for shortest in (0, 1):
            rng = np.random.default_rng(0)
            assert len(objectives.poisson_spans(length, length, 3.0, shortest, rng)) <= 1
            assert objectives.poisson_spans(length, 0, 3.0, shortest, rng) == []


@pytest.mark.parametrize("shortest", [0, 1])
def test_span_lengths_are_poisson(shortest):
    """Frequencies of the lengths from `shortest` on, against the probabilities, as chi-square."""
    spans = objectives.poisson_spans(100_000, 30_000, 3.0, shortest, np.random.default_rng(0))
    counts = Counter(end - start for start, end in spans)
    probabilities = {k: math.exp(-3) * 3 ** k / math.factorial(k) for k in range(shortest, 9)}
    total = sum(math.exp(-3) * 3 ** k / math.factorial(k) for k in range(shortest, 40))
    chi_square = sum((counts[k] - len(spans) * p / total) ** 2 / (len(spans) * p / total)
                     for k, p in probabilities.items())
    assert chi_square < len(probabilities) + 4 * math.sqrt(2 * len(probabilities))


def test_places_of_spans_are_uniform():
    """Two single tokens of seven that are no neighbours: all fifteen choices equally often."""
    rng, drawn = np.random.default_rng(0), Counter()
    while drawn.total() < 3000:
        spans = objectives.poisson_spans(7, 2, 0.2, 1, rng)
        if len(spans) == 2:
            drawn[tuple(start for start, _ in spans)] += 1
    assert set(drawn) == {(a, b) for a, b in combinations(range(7), 2) if b > a + 1}
    assert spread_is_even(list(drawn.values()))


def test_the_span_that_was_cut_can_be_anywhere():
    """First and last span are equally long on average: the cut one, drawn last, is not placed last."""
    rng = np.random.default_rng(0)
    spans = [objectives.poisson_spans(60, 20, 6.0, 1, rng) for _ in range(2000)]
    gaps = [(s[0][1] - s[0][0]) - (s[-1][1] - s[-1][0]) for s in spans]
    assert abs(np.mean(gaps)) < 4 * np.std(gaps) / math.sqrt(len(gaps))


# ---- BART --------------------------------------------------------------------------------------------------

def test_text_infilling_masks_each_span_once():
    """Between two kept tokens stands a mask where tokens are missing, at most one; 30 %, rounded up, are missing.
    """
    inserted = 0
    for seed in range(200):
        text = list(range(101))
        pair = objectives.text_infilling(text, np.random.default_rng(seed), MASK)
        kept = [token for token in pair.source if token != MASK]
        assert len(kept) == 70 and kept == sorted(kept) and pair.target == text
        parts = " ".join(map(str, [-1, *pair.source, 101])).replace(str(MASK), "|").split()
        for left, right in zip(parts, parts[1:]):
            assert (left, right) != ("|", "|")
            assert "|" in (left, right) or int(right) == int(left) + 1        # nothing goes without a mask
        inserted += sum(b == "|" and int(c) == int(a) + 1 for a, b, c in zip(parts, parts[1:], parts[2:]))
    assert 0.3 < inserted / 200 < 0.7                     # of about ten spans a share e^-3 is empty


def sentence_list(text: list[int]) -> list[tuple[int, ...]]:
    """A stop followed by another token that is none ends a sentence."""
    found = [[]]
    for token in text:
        if found[-1] and found[-1][-1] in STOPS and token not in STOPS:
            found.append([])
        found[-1].append(token)
    return [tuple(sentence) for sentence in found]


def test_sentence_permutation_moves_whole_sentences():
    """All orders of three sentences equally often; two stops stay together; no sentence is lost."""
    text, rng, orders = [1, 2, 7, 3, 8, 7, 4, 5, 6], np.random.default_rng(0), Counter()
    assert sentence_list(text) == [(1, 2, 7), (3, 8, 7), (4, 5, 6)]
    assert objectives.sentences(text, STOPS) == [(0, 3), (3, 6), (6, 9)]
    for _ in range(3000):
        pair = objectives.sentence_permutation(text, rng, STOPS)
        assert pair.target == text
        orders[tuple(pair.source)] += 1
    expected = {sum(order, ()) for order in permutations(sentence_list(text))}
    assert set(orders) == expected and spread_is_even(list(orders.values()))


def test_bart_permutes_then_infills():
    """What is left of each sentence is in order, 30 % are missing, sentences have changed places."""
    text = [token for s in range(10) for token in (*range(100 + 20 * s, 109 + 20 * s), 7)]
    swapped = 0
    for seed in range(50):
        pair = objectives.bart(text, np.random.default_rng(seed), MASK, STOPS)
        kept = [token for token in pair.source if token != MASK]
        assert pair.target == text and len(kept) == 70
        words = [token for token in kept if token != 7]
        for s in range(10):
            of_sentence = [token for token in words if 100 + 20 * s <= token < 120 + 20 * s]
            assert of_sentence == sorted(of_sentence)
        swapped += words != sorted(words)
    assert swapped == 50


def test_token_masking_and_deletion_hit_their_share():
    """The rest stays as it was: in place, or in order."""
    text, rng = list(range(20_000)), np.random.default_rng(0)
    masked = objectives.token_masking(text, rng, MASK)
    assert all(a in (b, MASK) for a, b in zip(masked.source, text, strict=True)) and masked.target == text
    deleted = objectives.token_deletion(text, rng)
    assert deleted.source == sorted(set(deleted.source)) and deleted.target == text
    for n_hit in (masked.source.count(MASK), len(text) - len(deleted.source)):
        assert abs(n_hit / 20_000 - 0.15) < 0.01
    assert objectives.token_masking(text, rng, MASK, density=1.0).source == [MASK] * 20_000
    assert objectives.token_deletion(text, rng, density=0.0).source == text


def test_document_rotation_begins_anywhere():
    """A cyclic shift; every token comes first equally often."""
    rng, firsts = np.random.default_rng(0), Counter()
    for _ in range(3000):
        source, target, _ = objectives.document_rotation(list(range(6)), rng)
        assert source == [*range(source[0], 6), *range(source[0])] and target == list(range(6))
        firsts[source[0]] += 1
    assert len(firsts) == 6 and spread_is_even(list(firsts.values()))


def test_keep_end_spares_the_end_token():
    """It stays last in source and target; a text without one, and the empty text, are noised whole."""
    spared = partial(objectives.keep_end, noise=objectives.document_rotation, end=END)
    for seed in range(20):
        source, target, _ = spared([1, 2, 3, 4, END], np.random.default_rng(seed))
        assert source[-1] == END and sorted(source) == [1, 2, 3, 4, END] and target == [1, 2, 3, 4, END]
    sources = {tuple(spared([1, 2, 3], np.random.default_rng(seed)).source) for seed in range(20)}
    assert len(sources) == 3
    assert spared([], np.random.default_rng(0)) == Pair([], [])
    assert spared([END], np.random.default_rng(0)) == Pair([END], [END])


# ---- GLM ---------------------------------------------------------------------------------------------------

def test_glm_example_by_hand():
    """Two spans of one text, in both orders: source, target and blanks written out."""
    text, spans, seen = [10, 11, 12, 13, 14, 15], [(2, 3), (4, 6)], set()
    for seed in range(20):
        pair = objectives.glm_pair(text, np.random.default_rng(seed), spans, MASK, SOP, EOP)
        assert pair.source == [10, 11, MASK, 13, MASK]
        first, second = [SOP, 12, EOP], [SOP, 14, 15, EOP]
        assert (pair.target, pair.blanks) in ((first + second, (2, 4)), (second + first, (4, 2)))
        seen.add(pair.blanks)
    assert len(seen) == 2


def test_glm_input_and_labels_are_filters_of_the_target():
    """Equally long; a label is what follows its input, and what follows the last of a span is eop."""
    text = np.random.default_rng(0).integers(0, 50, 200).tolist()
    target = OBJECTIVES["glm_spans"](text, np.random.default_rng(0)).target
    inputs, labels = ([token for token in target if token != left_out] for left_out in (EOP, SOP))
    assert len(inputs) == len(labels)
    for i, (token, label) in enumerate(zip(inputs, labels)):
        goes_on = i + 1 < len(inputs) and inputs[i + 1] != SOP
        assert label == (inputs[i + 1] if goes_on else EOP)


def test_glm_spans_are_short_and_shuffled():
    """15 % of the tokens, rounded up; none is empty; three come in any of six orders, equally often."""
    orders = Counter()
    for seed in range(6000):
        pair = OBJECTIVES["glm_spans"](list(range(61)), np.random.default_rng(seed))
        assert len(pair.target) - 2 * len(pair.blanks) == 10 and pair.source.count(MASK) == len(pair.blanks)
        assert (SOP, EOP) not in zip(pair.target, pair.target[1:])
        if len(pair.blanks) == 3:
            orders[tuple(np.argsort(pair.blanks).tolist())] += 1
    assert len(orders) == 6 and spread_is_even(list(orders.values()))


def test_glm_sentences_are_whole_and_just_enough():
    """Blanks are sentences of the text, and without the last one drawn they would be less than 15 %."""
    text = [token for s in range(12) for token in (*range(100 + 20 * s, 103 + 20 * s + s % 3), 8)]
    for seed in range(100):
        pair = OBJECTIVES["glm_sentences"](text, np.random.default_rng(seed))
        blanks = " ".join(map(str, pair.target)).replace(str(EOP), "").split(str(SOP))[1:]
        blanks = [tuple(map(int, blank.split())) for blank in blanks]
        assert set(blanks) <= set(sentence_list(text)) and pair.source.count(SMASK) == len(blanks)
        sizes = sorted(map(len, blanks))
        assert sum(sizes) >= 0.15 * len(text) > sum(sizes) - sizes[-1]
    lone = OBJECTIVES["glm_sentences"]([1, 2, 3], np.random.default_rng(0))
    assert lone == Pair([SMASK], [SOP, 1, 2, 3, EOP], (0,))


@pytest.mark.parametrize("shortest, lengths",
                         [(0.5, range(5, 11)), (0.0, range(1, 11)), (0.25, range(3, 11))])
def test_glm_document_is_the_end_of_the_text(shortest, lengths):
    """The rest behind the mask; every length from the shortest to the whole equally often."""
    rng, drawn = np.random.default_rng(0), Counter()
    for _ in range(3000):
        source, target, blanks = objectives.glm_document(list(range(10)), rng, GMASK, SOP, EOP, shortest)
        n = len(target) - 2
        assert source == [*range(10 - n), GMASK] and target == [SOP, *range(10 - n, 10), EOP]
        assert blanks == (10 - n,)
        drawn[n] += 1
    assert sorted(drawn) == list(lengths) and spread_is_even(list(drawn.values()))


@pytest.mark.parametrize("name, shares, shortest", [("glm_10b", {MASK: 0.5, SMASK: 0.3, GMASK: 0.2}, 10),
                                                    ("glm_130b", {MASK: 0.3, GMASK: 0.7}, 1)])
def test_glm_mixtures_have_their_shares(name, shares, shortest):
    """Which mask a source has, over many texts of 40 tokens, and how many of them [gMASK] stands for."""
    rng, text = np.random.default_rng(0), [1, 2, 3, 7] * 10
    pairs = [OBJECTIVES[name](text, rng) for _ in range(4000)]
    drawn = Counter(mask for pair in pairs for mask in {MASK, SMASK, GMASK} & set(pair.source))
    assert set(drawn) == set(shares) and drawn.total() == 4000
    for mask, share in shares.items():
        assert abs(drawn[mask] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)
    lengths = {len(pair.target) - 2 for pair in pairs if GMASK in pair.source}
    assert (min(lengths), max(lengths)) == (shortest, 40)


# ---- UL2 ---------------------------------------------------------------------------------------------------

def denoiser_of(pair: Pair) -> tuple:
    """(mode, tokens, spans) that were masked of 200, as they are seen in a pair."""
    mode = next(letter for letter, token in MODES.items() if token == pair.source[0])
    if mode == "S":
        return mode, None, None
    n_spans = sum(token in SENTINELS for token in pair.source)
    return mode, len(pair.target) - n_spans - 1, n_spans


@pytest.mark.parametrize("denoisers, expected", [
    (objectives.UL2, {("R", 30, 10): 1, ("R", 30, 4): 1, ("S", None, None): 1, ("X", 100, 33): 1,
                      ("X", 100, 12): 1, ("X", 30, 1): 1, ("X", 100, 2): 1}),
    (objectives.U_PALM, {("S", None, None): 4, ("R", 30, 10): 2, ("X", 30, 1): 1, ("X", 100, 33): 1})])
def test_ul2_mixes_its_denoisers(denoisers, expected):
    """Mode, masked tokens of 200 and number of spans name the denoiser; each has its share."""
    rng = np.random.default_rng(0)
    pairs = [objectives.ul2(list(range(200)), rng, SENTINELS, MODES, denoisers) for _ in range(4000)]
    drawn = Counter(map(denoiser_of, pairs))
    assert set(drawn) == set(expected)
    for denoiser, parts in expected.items():
        share = parts / sum(expected.values())
        assert abs(drawn[denoiser] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)


@pytest.mark.parametrize("density, most", [(0.25, 9), (0.5, 19)])
def test_ul2_sequential_denoising_is_prefix_lm(density, most):
    """The last tokens, as they are; their number is uniform, on average r L; something is left before."""
    rng, lengths = np.random.default_rng(0), Counter()
    for _ in range(4000):
        source, target, _ = objectives.ul2(list(range(20)), rng, SENTINELS, MODES, (("S", density, None),))
        assert source[0] == MODES["S"] and source[1:] + target == list(range(20)) and len(source) > 1
        lengths[len(target)] += 1
    assert sorted(lengths) == list(range(1, most + 1)) and spread_is_even(list(lengths.values()))
    assert (1 + most) / 2 == density * 20


def test_ul2_needs_sentinels_for_its_densest_denoiser():
    """A third of half of the text: the sentence is span_corruption's."""
    with pytest.raises(ValueError, match="33 spans need 34 sentinels; there are 20"):
        for seed in range(50):
            objectives.ul2(list(range(200)), np.random.default_rng(seed), SENTINELS[:20], MODES)


# ---- one text before and after -----------------------------------------------------------------------------

def test_picture():
    """One text, its words as tokens, before and after every objective (shown by pytest -s)."""
    words = ("A mask says who may attend to whom . The source is read in both directions . The target is "
             "written word by word . An objective says what is source and what target . That is all ."
             ).split()
    names = {**{-1 - i: word for i, word in enumerate(dict.fromkeys(words))},
             **{token: f"<{i}>" for i, token in enumerate(SENTINELS)},
             **{token: f"[{mode}]" for mode, token in MODES.items()},
             MASK: "[MASK]", SMASK: "[sMASK]", GMASK: "[gMASK]", SOP: "sop", EOP: "eop"}
    ids = {name: token for token, name in names.items()}
    text = [ids[word] for word in words]
    print("\n" + " ".join(words))
    for name, objective in OBJECTIVES.items():
        if "ends" in getattr(objective, "keywords", {}):
            objective = partial(objective, ends={ids["."]})
        pair = objective(text, np.random.default_rng(4))
        source, target = (" ".join(names[token] for token in tokens) for tokens in pair[:2])
        target = "(the text)" if pair.target == text else target
        print(f"\n{name}\n  source  {source}\n  target  {target}"
              + (f"\n  blanks  {' '.join(map(str, pair.blanks))}" if pair.blanks else ""))
        assert BACK.get(name, lambda pair: pair.target)(pair) == text

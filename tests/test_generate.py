"""Generation: the cache against the full forward pass, and the draws against plain definitions."""
import copy
import math

import pytest
import torch

import common
import masks
from conftest import STRUCTURES, random_tokens
from data import Example, lay_out
from errors import UserError
from generate import Decoding, answers_to_show, beam_search, generate, generate_many, likeliest, next_tokens
from shapes import check_shapes

PROMPT_LENGTHS = (5, 0, 1, 9, 3)


def full_logits(network, prompt, answer, tokenizer) -> torch.Tensor:
    """Logits (1 + n, V) of the tokens after the prompt: every position computed anew, no cache, no batch."""
    structure = network.config.structure
    batch = lay_out([Example(prompt, [answer])], structure, 1, tokenizer)
    first = 0 if structure == "encdec" else len(prompt)        # here stands <bos>, or the prompt's last token
    where = torch.arange(batch.tokens.shape[1])[None] >= first
    return network(batch, masks.of_batch(structure, batch), where)


def forbidden(tokenizer) -> list[int]:
    return [token for token in tokenizer.specials.values() if token != tokenizer.end]


def uncached_greedy(network, prompt, tokenizer, max_new: int) -> list[int]:
    """The definition: the most likely token that may be drawn, appended, and all computed once more."""
    answer = []
    while len(answer) < max_new and tokenizer.end not in answer:
        logits = full_logits(network, prompt, answer, tokenizer)[-1]
        logits[forbidden(tokenizer)] = -math.inf
        answer.append(int(logits.argmax()))
    return answer


@pytest.mark.parametrize("kv_heads, positions", [(1, "rope"), (2, "rope"), (2, "alibi"), (2, "relative")])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_greedy_with_cache_equals_greedy_without(structure, kv_heads, positions, random_model, tokenizer):
    """Token by token, for prompts of unequal length in one batch, one of them empty; heads that share keys keep
    biases of their own.
    """
    network = random_model(structure, layers=2, kv_heads=kv_heads, positions=positions)
    prompts = [random_tokens(n) for n in PROMPT_LENGTHS]
    answers = generate(network, prompts, tokenizer, max_new=10, temperature=0)
    assert answers == [uncached_greedy(network, prompt, tokenizer, 10) for prompt in prompts]
    assert len({token for answer in answers for token in answer}) > 5        # not one token again and again


@pytest.mark.parametrize("structure", STRUCTURES)
def test_cached_logits_equal_full_logits(structure, random_model, tokenizer):
    """Reading given tokens one by one yields the logits of the full forward pass at every step."""
    network, n = random_model(structure, layers=2), 6
    prompts, answers = [random_tokens(n) for n in PROMPT_LENGTHS], [random_tokens(n) for _ in PROMPT_LENGTHS]
    decoding = Decoding(network, prompts, n, tokenizer)
    steps = [decoding.read_prompt(), *(decoding.read(new) for new in torch.tensor(answers).T)]
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        torch.testing.assert_close(torch.stack([logits[i] for logits in steps]),
                                   full_logits(network, prompt, answer, tokenizer), atol=2e-5, rtol=0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_answers_come_in_the_order_of_the_prompts(structure, random_model, tokenizer):
    """Whatever shares a batch, answer i belongs to prompt i, and its neighbours do not change it."""
    network, prompts = random_model(structure, layers=2), [random_tokens(n) for n in PROMPT_LENGTHS]
    alone = [generate(network, [prompt], tokenizer, 5, temperature=0)[0] for prompt in prompts]
    assert len({tuple(answer) for answer in alone}) > 2
    for batch_size in (1, 2, 256):
        assert generate(network, prompts, tokenizer, 5, temperature=0, batch_size=batch_size) == alone
    assert generate(network, [], tokenizer, 5) == []


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_prompt_that_occurs_often_is_read_once(structure, random_model, tokenizer, monkeypatch):
    """Its answers are drawn one by one all the same, each from the distribution after its own prompt."""
    network, (a, b) = random_model(structure, layers=2), (random_tokens(4), random_tokens(7))
    read, before = [], Decoding.__init__
    monkeypatch.setattr(Decoding, "__init__", lambda self, model, prompts, *rest:
                        (read.append(len(prompts)), before(self, model, prompts, *rest))[1])
    alone = {0: generate(network, [a], tokenizer, 6, temperature=0)[0],
             1: generate(network, [b], tokenizer, 6, temperature=0)[0]}
    assert generate(network, [a, b, a, a, b], tokenizer, 6, temperature=0) == [alone[k] for k in (0, 1, 0, 0, 1)]
    assert read == [1, 1, 2] and alone[0] != alone[1]
    drawn = generate(network, 20 * [a], tokenizer, 6, generator=torch.Generator().manual_seed(0))
    assert len({tuple(answer) for answer in drawn}) > 10 and read[-1] == 1


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_end_token_stops(structure, random_model, tokenizer):
    """An answer holds its end token as its last, or max_new tokens; one that ends does not stop the rest."""
    network, prompts = random_model(structure, layers=2), [random_tokens(n) for n in PROMPT_LENGTHS]
    other = copy.copy(tokenizer)
    other.end = -1                                                  # without an end token
    endless = generate(network, prompts, other, 8, temperature=0)
    assert all(len(answer) == 8 for answer in endless)
    other.end = endless[0][4]                                       # a token that comes up is the end
    stopped = generate(network, prompts, other, 8, temperature=0)
    assert stopped == [row[:row.index(other.end) + 1] if other.end in row else row for row in endless]
    assert len(stopped[0]) < 8


def test_the_last_token_needs_no_position(random_model, tokenizer):
    """It is not read: <bos>, two tokens of a prompt and three of four that are drawn take six positions."""
    enough, too_few = (random_model("causal", positions="learned", max_positions=most) for most in (6, 5))
    assert len(generate(enough, [[65, 66]], tokenizer, 4, temperature=0)[0]) == 4
    with pytest.raises(UserError, match="has 5 positions; a prompt of 3 tokens and an answer of 4 need 6"):
        generate(too_few, [[65, 66]], tokenizer, 4)


def best_by_beams(network, prompt, tokenizer, tokens: list[int], max_new: int, beams: int, power: float):
    """The definition, one hypothesis at a time: (score, answer) of the best; no cache, no batch."""
    kept = [(0.0, 0.0, [])]                                             # score, log p, tokens
    for _ in range(max_new):
        grown = [hypothesis for hypothesis in kept if tokenizer.end in hypothesis[2]]
        for _, nats, answer in kept:
            if tokenizer.end in answer:
                continue
            logprobs = full_logits(network, prompt, answer, tokenizer)[-1][tokens].log_softmax(-1).tolist()
            grown += [((nats + more) / (len(answer) + 1) ** power, nats + more, [*answer, token])
                      for token, more in zip(tokens, logprobs)]
        kept = sorted(grown, reverse=True)[:beams]
    return kept[0][2]


@pytest.mark.parametrize("beams, power", [(2, 1.0), (3, 0.0), (200, 0.6)])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_beam_search_finds_what_the_plain_loop_finds(structure, beams, power, random_model, tokenizer, monkeypatch):
    """Of few beams the same answer; of 200, more than there are answers, the best of all."""
    tokens = [65, 66, 67, 68, tokenizer.end]
    monkeypatch.setattr("generate.never_drawn", lambda vocab, tokenizer, device:
                        torch.tensor([token for token in range(vocab) if token not in tokens]))
    network, prompts = random_model(structure, layers=2), [random_tokens(n) for n in PROMPT_LENGTHS]
    found = beam_search(network, prompts, tokenizer, 4, beams, power, batch_size=3)
    assert found == [best_by_beams(network, prompt, tokenizer, tokens, 4, beams, power) for prompt in prompts]
    assert len({tuple(answer) for answer in found}) > 1


@pytest.mark.parametrize("structure", STRUCTURES)
def test_one_beam_is_greedy(structure, random_model, tokenizer):
    network, prompts = random_model(structure, layers=2), [random_tokens(n) for n in PROMPT_LENGTHS]
    assert beam_search(network, prompts, tokenizer, 8, beams=1) == generate(network, prompts, tokenizer, 8, 0.0)
    assert beam_search(network, [], tokenizer, 8) == []


def test_only_the_end_among_special_tokens_is_drawn(random_model, tokenizer):
    """With all tokens nearly alike, <pad>, <bos> and sentinels never come, and most others do."""
    answers = generate(random_model("causal"), [[]] * 200, tokenizer, 20, temperature=1e4)
    drawn = {token for answer in answers for token in answer}
    assert not drawn & set(forbidden(tokenizer))
    assert tokenizer.end in drawn and len(drawn) > 0.95 * (tokenizer.vocab - len(forbidden(tokenizer)))


def test_what_pads_a_vocabulary_is_never_drawn(random_model, tokenizer):
    """Not where special tokens are wanted either."""
    fewer = copy.copy(tokenizer)
    fewer.vocab = tokenizer.vocab - 5
    answers = generate(random_model("causal"), [[]] * 100, fewer, 20, temperature=1e4, specials=True)
    special = {token for answer in answers for token in answer} - set(tokenizer.text)
    assert len(special) > 5 and max(special) < fewer.vocab


def test_the_generator_decides_the_draws(random_model, tokenizer):
    """The same seed gives the same answers whatever torch's global generator holds; another seed others."""
    network, prompts = random_model("prefix"), [random_tokens(n) for n in PROMPT_LENGTHS]

    def draw(seed):
        return generate(network, prompts, tokenizer, 6, generator=torch.Generator().manual_seed(seed))
    first = draw(1)
    torch.rand(3)
    assert draw(1) == first != draw(2)


def test_the_seed_decides_the_draws_of_many_prompts(random_model, tokenizer):
    """256 are drawn at a time; the next ones are drawn differently."""
    network, run = random_model("causal"), common.Run(None, torch.device("cpu"), torch.float32)
    first, again, other = (generate_many(run, network, [[65]] * 512, tokenizer, 4, 1.0, seed)
                           for seed in (1, 1, 2))
    assert first == again != other and first[:256] != first[256:]


def test_the_seed_decides_what_is_shown(random_model, tokenizer):
    network, examples = random_model("causal"), [Example([65], [[66]])]
    first, again, other = (answers_to_show(network, examples, tokenizer, seed) for seed in (1, 1, 2))
    assert first == again != other


# ---- one draw ----------------------------------------------------------------------------------------------

LOGITS = [1.0, 3.0, 0.5, 2.5, -1.0, 2.0, -0.5]


def kept(temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """token -> probability, by definition: the most likely, at most k, until their share reaches p."""
    exponentials = {token: math.exp(x / temperature) for token, x in enumerate(LOGITS)}
    ranking = sorted(exponentials, key=exponentials.get, reverse=True)[:top_k or None]
    total, chosen = sum(exponentials[token] for token in ranking), []
    for token in ranking:
        if sum(exponentials[t] for t in chosen) < top_p * total:
            chosen.append(token)
    return {token: exponentials[token] / sum(exponentials[t] for t in chosen) for token in chosen}


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 1, 1.0), (1.0, 7, 1.0), (1.0, 50, 1.0),
    (1.0, 0, 0.5), (1.0, 0, 0.8), (1.5, 0, 0.9), (1.0, 0, 1e-6), (1.0, 4, 0.7), (0.7, 3, 0.95)])
def test_frequencies_follow_the_definition(temperature, top_k, top_p):
    """What is cut off never comes; the others come as often as the renormalised softmax says (chi-square)."""
    n, expected = 20_000, kept(temperature, top_k, top_p)
    logits, generator = torch.tensor(LOGITS).expand(n, -1), torch.Generator().manual_seed(0)
    drawn = next_tokens(logits, temperature, top_k, top_p, generator)
    counts = torch.bincount(drawn, minlength=len(LOGITS)).tolist()
    assert {token for token, count in enumerate(counts) if count} == set(expected)
    chi_square = sum((counts[token] - n * p) ** 2 / (n * p) for token, p in expected.items())
    freedom = len(expected) - 1
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom)


def test_rows_are_cut_apart():
    """top_k and top_p look at each row by itself, and leave the caller's logits as they are."""
    logits = torch.stack([torch.tensor(LOGITS), -torch.tensor(LOGITS)])
    before = logits.clone()
    for top_k, top_p in ((1, 1.0), (0, 0.3)):
        assert next_tokens(logits, 1.0, top_k, top_p, None).tolist() == [1, 4]
    assert next_tokens(logits, 0, 0, 1.0, None).tolist() == [1, 4]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("top_k", [0, 3])
def test_shapes_are_what_names_say(top_k):
    """Every suffixed local of a draw has the dimensions of its name."""
    _, seen = check_shapes(next_tokens, torch.tensor(LOGITS).expand(4, -1), 1.0, top_k, 0.8, None)
    assert seen["next_tokens"] > 2


@pytest.mark.parametrize("structure", STRUCTURES)
def test_shapes_of_decoding_are_what_names_say(structure, random_model, tokenizer):
    """The same for reading prompts and tokens with the cache."""
    prompts = [random_tokens(n) for n in PROMPT_LENGTHS]
    _, seen = check_shapes(generate, random_model(structure), prompts, tokenizer, 3)
    assert {"generate", "read", "logits", "decode", "append"} <= set(seen)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_is_shown_as_likeliest_are_tokens_that_exist(structure, random_model, tokenizer):
    """A published vocabulary may be padded behind its tokens."""
    fewer = copy.copy(tokenizer)
    fewer.vocab = 256
    example = Example(random_tokens(5), [random_tokens(80)])
    shown = [likeliest(random_model(structure), example, of) for of in (tokenizer, fewer)]
    assert max(shown[0]) >= 256 > max(shown[1])

"""The measurements of claims.py about structures, pretraining and supervised fine-tuning."""
import copy
import itertools
import time

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flow import Flow, data_of, metrics_of, write_pairs

import checkpoint
import corpus
import data
import evaluate
import labeller
import masks
import model as model_file
import objectives
import train_pretrain
import train_sft
from errors import Fault
from generate import generate

# ---- the three structures ----------------------------------------------------------------------------------

STRUCTURES = {"causal, next token": dict(structure="causal"),
              "causal, prefix LM": dict(structure="causal", objective="prefix_lm"),
              "causal, prefix LM, source half counted": dict(structure="causal", objective="prefix_lm",
                                                             source_weight=0.5),
              "prefix, prefix LM": dict(structure="prefix", objective="prefix_lm"),
              "encoder-decoder, as many layers in each stack":
                  dict(structure="encdec", objective="prefix_lm"),
              "encoder-decoder, 1.03 times the parameters": dict(structure="encdec", objective="prefix_lm",
                                                               layers=1, width=144)}
STRUCTURES |= {f"{name}, lr 0.001": STRUCTURES[name] | dict(lr=1e-3) for name in (
    "causal, prefix LM", "encoder-decoder, as many layers in each stack",
    "encoder-decoder, 1.03 times the parameters")}
EQUAL_ARITHMETIC = {name: STRUCTURES[name] for name in ("causal, prefix LM", "causal, prefix LM, lr 0.001")}
EQUAL_ARITHMETIC |= {f"encoder-decoder, two layers of 136 in each stack{rate}":
                     dict(structure="encdec", objective="prefix_lm", layers=2, width=136, **settings)
                     for rate, settings in (("", {}), (", lr 0.001", dict(lr=1e-3)))}
BEGINNING, ENDS = 32, (16, 64, 128, 256)             # tokens that are continued, and how far


def structures(flow: Flow) -> list[dict]:
    """One budget of tokens, three structures: loss on texts and on summaries, speed, long continuations."""
    return compared(flow, STRUCTURES)


def equal_arithmetic(flow: Flow) -> list[dict]:
    """The same for an encoder-decoder whose tokens cost as many FLOPs as the decoder's, or nearly so."""
    return compared(flow, EQUAL_ARITHMETIC)


def compared(flow: Flow, variants: dict[str, dict]) -> list[dict]:
    """A row for each variant: what it reads and costs, and what it does after the same short SFT."""
    rows = []
    for name, settings in variants.items():
        pretrain, sft = pretrained_and_tuned(flow, **settings)
        model, line = checkpoint.load_model(pretrain), metrics_of(pretrain, "counted")[-1]
        rows.append({"row": name, "parameters": model_file.parameter_count(model),
                     "counted_per_step": line["counted"],
                     **price_of_token(pretrain),
                     "loss_summary": metrics_of(sft)[-1]["loss"], **summaries(flow, sft),
                     **continuations(flow, pretrain, model), "curve": curve(pretrain)})
    return rows


def ends_of(flow: Flow) -> tuple[int, ...]:
    return ENDS[:1] if flow.config.tiny else ENDS


def pretrained_and_tuned(flow: Flow, structure: str, objective: str = "next_token", lr: float = 3e-3,
                         **others) -> tuple[str, str]:
    """A fifth of pretraining's steps, and of SFT's: the two runs. What several measurements compare is
    trained once. SFT has a rate that the encoder-decoder bears: the default costs it 0.1 to 0.2 nats.
    """
    name = "_".join([structure, objective, *(f"{key}_{value}" for key, value in others.items()), f"{lr:g}"])
    context, steps = BEGINNING + ends_of(flow)[-1] + 1, flow.steps(train_pretrain, 0.2)
    pretrain = flow.train(train_pretrain, name, structure=structure, objective=objective, lr=lr, **others,
                          **steps, context=context, row=context, save_every=max(1, steps["steps"] // 4),
                          keep=5)
    return pretrain, flow.sft(f"{name}_sft", init=pretrain, lr=3e-3, source_weight=0.0, save_every=0,
                              **flow.steps(train_sft, 0.2))


def nats_of(model, examples: list[data.Example], tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats, place in its target) of every target token (N,), for a model of any structure and objective
    that has a tokenizer of ours.
    """
    structure, nats, place = model.config.structure, [], []
    for start in range(0, len(examples), 32):
        batch = data.lay_out(examples[start:start + 32], structure, 320, tokenizer)
        logits_NV = model(batch, masks.of_batch(structure, batch), batch.loss_mask)
        nats.append(-objectives.token_logprobs(logits_NV, batch.targets[batch.loss_mask]))
        # an encoder-decoder predicts the first target token at its own <bos>, a decoder at the source's end
        place.append(batch.positions_2d[1][batch.loss_mask] - int(structure == "encdec"))
    return torch.cat(nats), torch.cat(place)


@torch.no_grad()
def curve(folder: str) -> list[list[float]]:
    """[tokens read in training, nats per token of the same ends of held-out texts] at every checkpoint."""
    config, _, loaded = data_of(train_pretrain, folder, objective="prefix_lm", eval_size=300)
    losses = [(step, nats_of(checkpoint.load_model(folder, step=step), loaded.held_out, loaded.tokenizer)[0])
              for step in checkpoint.steps_of(folder)]
    return [[step * config.batch_size * config.context, round(float(nats.mean()), 4)]
            for step, nats in losses]


def price_of_token(folder: str) -> dict[str, float]:
    """Of a token read in training, forward and backward: its arithmetic in million FLOPs, as torch counts
    matrix products, and milliseconds of whole steps on one thread, the best of four times through the same
    six, since another run may be at work beside this one.
    """
    config, run, loaded = data_of(train_pretrain, folder)
    model = checkpoint.load_model(folder)
    optimizer, seconds, steps = train_pretrain.build_optimizer(config, model), [], range(6)

    def train() -> None:
        for step in steps:
            train_pretrain.train_step(config, run, loaded, model, optimizer, step)

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:    # fused it is not counted
        train()
    for _ in range(4):
        begun = time.perf_counter()
        train()
        seconds.append(time.perf_counter() - begun)
    tokens = len(steps) * config.batch_size * config.context
    return {"mflops_per_token_trained": counter.get_total_flops() / tokens / 1e6,
            "ms_per_token_trained": 1000 * min(seconds) / tokens}


def summaries(flow: Flow, sft: str, model=None, n: int = 200, temperatures=(0.0,), **settings) -> dict:
    """The labeller's score of one-line summaries of n held-out functions: understanding what is read. And the
    share of them that end within 40 tokens. model: another than that of this run, on its prompts. settings:
    of the SFT, changed for its data, as seed for the choice of functions.
    """
    (config, _, loaded), judge = data_of(train_sft, sft, eval_size=n, **settings), judge_of(flow)
    prompts, decode = [example.source for example in loaded.held_out], loaded.tokenizer.decode
    model, figures = model or checkpoint.load_model(sft), {}
    for temperature in temperatures:
        answers = generate(model, prompts, loaded.tokenizer, 40, temperature,
                           generator=torch.Generator().manual_seed(config.seed))
        pairs = [(decode(prompt), decode(answer)) for prompt, answer in zip(prompts, answers)]
        greedy = "" if temperature else "_greedy"
        figures |= {f"gold{greedy}": float(np.mean([judge.gold(*pair) for pair in pairs])),
                    f"about{greedy}": float(np.mean([labeller.about(*pair) for pair in pairs])),
                    "ended": float(np.mean([answer[-1] == loaded.tokenizer.end for answer in answers]))}
    return figures


def pairs_of(flow: Flow) -> tuple[list[corpus.Record], list[corpus.Record]]:
    """(training pairs, held-out pairs)."""
    records = [r for r in corpus.load_records(flow.config.data, flow.config.tiny) if r.response]
    return corpus.split(records, checkpoint.held_out_names(flow.pretrain()))


def judge_of(flow: Flow) -> labeller.Labeller:
    return labeller.Labeller(data.texts_of(pairs_of(flow)[0]))


@torch.no_grad()
def continuations(flow: Flow, folder: str, model) -> dict[str, float]:
    """Held-out texts cut after 32 tokens: nats per token of what follows, near and far; the share of repeated
    word pairs in sampled continuations, and what the judge thinks of them; milliseconds per generated token.

    The labeller knows lines of documentation alone. The judge of a continuation is the seed's base model,
    which has read four times as much: its nats per token of the sampled text, and of what the author wrote.
    """
    _, _, loaded = data_of(train_pretrain, folder, objective="next_token", eval_size=10_000)
    ends = ends_of(flow)
    whole = BEGINNING + ends[-1]
    long = [text for example in loaded.held_out for text in example.targets if len(text) >= whole]
    examples = [data.Example(text[:BEGINNING], [text[BEGINNING:whole]]) for text in long[:100]]
    nats, place = nats_of(model, examples, loaded.tokenizer)
    found = {f"loss_{low}_{high}": float(nats[(place >= low) & (place < high)].mean())
             for low, high in zip((0, *ends), ends)}
    beginnings = [example.source for example in examples[:50]]
    written = generate(model, beginnings, loaded.tokenizer, ends[-1],
                       generator=torch.Generator().manual_seed(flow.seed))
    lines = [loaded.tokenizer.decode(answer) for answer in written]
    pairs = [evaluate.distinct([line]) for line in lines if len(line.split()) > 3]
    judge = checkpoint.load_model(flow.pretrain())
    room = train_pretrain.Config.context - BEGINNING - 1               # the judge has read no longer texts
    human, judged = [example.targets[0] for example in examples[:50]], {}
    for name, answers in (("judged", written), ("judged_human", human)):
        read = [data.Example(text, [answer[:room]]) for text, answer in zip(beginnings, answers)]
        judged[name] = float(nats_of(judge, read, loaded.tokenizer)[0].mean())
    return {**found, "texts": len(examples), "written": float(np.mean([len(answer) for answer in written])),
            **judged,
            "repeated_pairs": 1 - float(np.mean(pairs)) if pairs else None,
            "ms_per_generated_token": ms_per_token_generated(model, beginnings, loaded.tokenizer, ends[-1])}


def ms_per_token_generated(model, prompts: list[list[int]], tokenizer, n: int) -> float:
    """Of n tokens after every prompt, on one thread, the best of three times. No end is honoured: a batch
    that waits for its last answer would take as long for fewer tokens.
    """
    endless, seconds = copy.copy(tokenizer), []
    endless.end = -1
    for _ in range(3):
        begun = time.perf_counter()
        generate(model, prompts, endless, n, generator=torch.Generator().manual_seed(1))
        seconds.append(time.perf_counter() - begun)
    return 1000 * min(seconds) / (n * len(prompts))


# ---- objectives --------------------------------------------------------------------------------------------

OBJECTIVES = (("causal", "next_token"), ("causal", "prefix_lm"), ("prefix", "prefix_lm"),
              ("prefix", "span_corruption"), ("prefix", "ul2"), ("prefix", "glm_130b"),
              ("encdec", "prefix_lm"), ("encdec", "span_corruption"), ("encdec", "bart"))
WRITES_ON = ("next_token", "prefix_lm", "ul2")       # objectives that teach to go on with a text


def structures_and_objectives(flow: Flow) -> list[dict]:
    """One budget of tokens, nine pairs of a structure and an objective, two learning rates, the same SFT."""
    rows = []
    for (structure, objective), lr in itertools.product(OBJECTIVES, (3e-3, 1e-3)):
        pretrain, sft = pretrained_and_tuned(flow, structure, objective, lr)
        row = {"row": f"{structure}, {objective}, {lr:g}",
               "parameters": model_file.parameter_count(checkpoint.load_model(pretrain))}
        if objective in WRITES_ON:
            row["loss_prefix_lm"] = loss_of_ends(pretrain)
        scores = summaries(flow, sft, temperatures=(1.0, 0.0), seed=1)
        rows.append(row | {"loss_sft": metrics_of(sft)[-1]["loss"],
                           **{name: scores[name] for name in ("gold", "gold_greedy", "about_greedy")}})
    return rows


def loss_of_ends(pretrain: str) -> float:
    """Nats per token of the ends of held-out texts, given their beginnings."""
    config, run, loaded = data_of(train_pretrain, pretrain, objective="prefix_lm")
    return train_pretrain.evaluate(config, run, loaded, checkpoint.load_model(pretrain))["loss"]


# ---- pretraining -------------------------------------------------------------------------------------------

def pretraining_settings(flow: Flow) -> list[dict]:
    """Pretraining is sensitive to its settings: learning rate x warm-up x batch, at equal tokens."""
    rows = []
    for batch_size, share in ((4, 0.1), (16, 0.1 / 4)):
        for warmup_share in (1 / 200, 1 / 4):
            for lr in (3e-4, 3e-3, 3e-2, 1e-1):
                steps = flow.steps(train_pretrain, share)
                steps["warmup"] = round(warmup_share * steps["steps"])
                name = f"pretrain_batch{batch_size}_warmup{warmup_share:.1%}_lr{lr:g}"
                row = {"row": f"batch {batch_size}, warm-up {warmup_share:.1%}, lr {lr:g}", "lr": lr}
                try:
                    folder = flow.train(train_pretrain, name, batch_size=batch_size, lr=lr, **steps)
                    row["bits_per_byte"] = metrics_of(folder)[-1]["bits_per_byte"]
                except Fault as fault:                             # a loss that is not finite
                    row["diverged"] = str(fault)
                rows.append(row)
    return rows


def width_transfer(flow: Flow) -> list[dict]:
    """The best learning rate of a narrow model is not that of a wide one."""
    rows = []
    for width in (64, 128, 256):
        for lr in (1e-3, 3e-3, 1e-2):
            folder = flow.train(train_pretrain, f"pretrain_width{width}_lr{lr:g}", width=width, lr=lr,
                                **flow.steps(train_pretrain, 0.06))
            rows.append({"row": f"width {width}, lr {lr:g}", "width": width, "lr": lr,
                         "bits_per_byte": metrics_of(folder)[-1]["bits_per_byte"]})
    return rows


# ---- supervised fine-tuning --------------------------------------------------------------------------------

def shuffled_pairs(flow: Flow) -> tuple[list[corpus.Record], list[corpus.Record]]:
    """(training pairs in a random order, held-out pairs)."""
    train, held_out = pairs_of(flow)
    return [train[i] for i in np.random.default_rng(flow.seed).permutation(len(train))], held_out


def tuned_on(flow: Flow, name: str, pairs: list[tuple[str, str]], held_out, init: str) -> tuple[str, dict]:
    """A short SFT on these pairs alone: its folder; loss on the held-out human answers, score of greedy ones.
    """
    path = write_pairs(flow.folder / f"{name}.jsonl", pairs + [(r.prompt, r.response) for r in held_out])
    sft = flow.sft(name, init=init, data=path, **flow.steps(train_sft, 0.15))
    return sft, {"loss": metrics_of(sft)[-1]["loss"], **summaries(flow, sft)}


def losses_under_base(flow: Flow, pairs: list[corpus.Record]) -> np.ndarray:
    """Nats per token of each answer after its prompt, by the base model."""
    base, tokenizer = checkpoint.load_model(flow.pretrain()), checkpoint.load_tokenizer(flow.pretrain(), "")
    prompts, answers = (tokenizer.encode_all([getattr(record, name) for record in pairs])
                        for name in ("prompt", "response"))
    study = evaluate.Study(tokenizer, prompts, answers, texts=[], labeller=judge_of(flow), reference=base,
                           reward=None, device=torch.device("cpu"), config=None)
    logprobs = evaluate.logprobs_of(study, base, answers, sampled=False)
    return -logprobs / np.array([len(answer) for answer in answers])


def random_base(flow: Flow) -> str:
    """A base model that has seen one step of text at a learning rate of nothing."""
    return flow.train(train_pretrain, "pretrain_none", steps=1, warmup=0, lr=0.0)


def pretraining_for_sft(flow: Flow) -> list[dict]:
    """Pretraining gives the ability, SFT the form: SFT from random weights and from the base model.
    Beside them, what the base model answers before any SFT.
    """
    (train, held_out), rows = shuffled_pairs(flow), []
    for name, init in (("random weights", random_base(flow)), ("base model", flow.pretrain())):
        for part in (64, 8, 1):
            n = max(train_sft.Config.batch_size, len(train) // part)
            pairs = [(r.prompt, r.response) for r in train[:n]]
            sft, figures = tuned_on(flow, f"sft_{name.split()[0]}_{part}", pairs, held_out, init)
            rows.append({"row": f"{name}, 1/{part} of the pairs", "pairs": n, **figures})
    return [before_sft(flow, sft), *rows]


def before_sft(flow: Flow, sft: str) -> dict:
    """The base model's row, on the held-out pairs of this SFT run."""
    (_, run, loaded), base = data_of(train_sft, sft), checkpoint.load_model(flow.pretrain())
    loss = train_sft.evaluate(train_sft.Config(), run, loaded, base)["loss"]
    return {"row": "base model, no SFT", "pairs": 0, "loss": loss, **summaries(flow, sft, base)}


def loss_on_prompt(flow: Flow) -> list[dict]:
    """Loss on the prompt too: a causal decoder's SFT learns to speak about the function from it."""
    runs = {weight: flow.sft(f"sft_source_weight_{weight:g}", source_weight=weight) for weight in (0.0, 0.1)}
    runs[train_sft.Config.source_weight] = flow.sft()
    return [{"row": f"source_weight {weight:g}", "loss": metrics_of(sft)[-1]["loss"],
             **summaries(flow, sft, n=flow.config.prompts)} for weight, sft in runs.items()]


def sft_selection(flow: Flow) -> list[dict]:
    """SFT data must be chosen: subsets of equal size, random, longest, scored, likely, repeated, noisy.
    The corpus holds no answer twice; the repeated ones show what duplicates would cost.
    """
    train, held_out = shuffled_pairs(flow)
    n = max(8, len(train) // 8)
    judge, rng = judge_of(flow), np.random.default_rng(flow.seed)
    gold = {id(r): judge.gold(r.prompt, r.response) for r in train}
    shuffled = [train[i].response for i in rng.permutation(n // 2)]
    half = [(r.prompt, response) for r, response in zip(train[:n // 2], shuffled)]
    twice = train[:2 * n]
    likely = [twice[i] for i in np.argsort(losses_under_base(flow, twice))]
    subsets = {"random": train[:n], "a quarter of these, four times each": 4 * train[:n // 4],
               "the likelier half of twice as many, by the base model": likely[:n],
               "the longest answers": sorted(train, key=lambda r: -len(r.response))[:n],
               "the best by the guideline": sorted(train, key=lambda r: -gold[id(r)])[:n],
               "the worst by the guideline": sorted(train, key=lambda r: gold[id(r)])[:n]}
    pairs = {name: [(r.prompt, r.response) for r in chosen] for name, chosen in subsets.items()}
    pairs["half of the answers shuffled"] = half + pairs["random"][n // 2:]
    return [{"row": name, "pairs": len(chosen),
             **tuned_on(flow, f"sft_select_{k}", chosen, held_out, flow.pretrain())[1]}
            for k, (name, chosen) in enumerate(pairs.items())]


MEASUREMENTS = (structures, equal_arithmetic, structures_and_objectives, pretraining_settings, width_transfer,
                pretraining_for_sft, loss_on_prompt, sft_selection)

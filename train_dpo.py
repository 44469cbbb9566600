"""DPO: the optimum of PPO, learnt from the comparisons themselves: no reward model, no sampling on the way.

    data              the comparisons of train_rm.py: K answers to each prompt, ranked (or --data with
                      prompt + chosen + rejected)
    initial weights   policy and frozen reference from SFT
    mask              the structure's: causal, prefix or encdec; never across documents
                      (answers to one prompt share its row without seeing each other)
    objective         log sigmoid(r_better - r_worse) over all pairs of a prompt, as for a reward model, with
                      r = beta log(policy / reference) of the whole answer (Rafailov et al. 2023, eq. 7)
    what is trained   the policy; the reference stays as it is
"""
import math
from dataclasses import dataclass

import numpy as np
import torch

import checkpoint
import command_line
import common
import corpus
import data
import masks
import model as model_file
import objectives
from errors import UserError
from generate import answers_to_show, generate_many
from labeller import NO_GOLD, TIE, Labeller, agreement, can_judge, collect_rankings, print_sources
from tokenizer import Tokenizer

# ---- 1. config ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = ""                      # own data, not the default corpus: a file, a folder, or several a,b
    init: str = "runs/sft"              # run folder to start from
    out: str = "runs/dpo"               # run folder
    beta: float = 0.1                   # price of a nat of log-ratio to the reference, in units of reward
    prompts: int = 8000                 # prompts whose answers are ranked
    answers: int = 5                    # answers to each, the human one among them: the paper's K
    mismatched: int = 1                 # human answers to other prompts, ranked among them in training
    temperature: float = 1.0            # at which answers are sampled
    max_new: int = 40                   # tokens of a sample at most
    label_noise: float = 0.0            # share of training comparisons in the wrong order; people: 0.13-0.16
    steps: int = 500                    # optimizer steps
    batch_size: int = 16                # sequences a step, all ranks together; here prompts with all answers
    context: int = 128                  # tokens of prompt and answer at most; max_new of them the answer's
    row: int = 256                      # tokens of a packed row, about: several sequences share one
    lr: float = 1e-4                    # highest learning rate
    warmup: int = 100                   # steps until it is reached; then a cosine down to a tenth
    weight_decay: float = 0.0           # on matrices only
    clip: float = 1.0                   # largest norm of the gradient, 0: not clipped
    log_every: int = 100                # steps between lines of the log, 0: only where it is evaluated
    eval_every: int = 400               # steps between evaluations, 0: only at the end
    eval_size: int = 500                # held-out sequences in an evaluation
    save_every: int = 400               # steps between checkpoints, 0: only at the end
    keep: int = 2                       # checkpoints kept
    resume: str = "auto"                # go on from the run folder's checkpoint: auto, must, never
    overwrite: bool = False             # replace the run that the folder holds, from the beginning
    micro_batch_size: int = 0           # sequences in one forward pass, 0: the whole step
    seed: int = 1                       # decides weights, order and draws
    device: str = "auto"                # auto, cpu, cuda, mps
    dtype: str = "auto"                 # auto (measured), fp32, bf16
    ranks: int = 0                      # processes on a CPU, 0: measured; on GPUs torchrun starts them
    compile: bool = False               # torch.compile the model
    tiny: bool = False                  # the whole stage in seconds, on a small part of the corpus

    TINY = dict(init="runs/tiny/sft", out="runs/tiny/dpo", prompts=100, answers=4, max_new=16, steps=20,
                batch_size=8, warmup=5, eval_every=10, eval_size=20, save_every=10)


# ---- 2. set-up ---------------------------------------------------------------------------------------------

def set_up(config: Config) -> common.Run:
    if config.beta <= 0:
        raise UserError(f"beta is {config.beta}; it must be above 0: it is what holds the policy back")
    return common.set_up(config)


# ---- 3. data -----------------------------------------------------------------------------------------------

@dataclass
class Data:
    tokenizer: Tokenizer
    train: list                         # what the steps draw from
    held_out: list                      # examples to evaluate on; no name occurs in both
    names: set                          # the names held out, here and in every later stage
    reference: torch.nn.Module          # the SFT model: it wrote the samples, and stays as it is
    labeller: Labeller                  # besides the ranking, for the reader of the log alone


def load_data(config: Config, run: common.Run) -> Data:
    tokenizer = checkpoint.load_tokenizer(config.init, "sft", config.tiny)
    records = [r for r in corpus.load_records(config.data, config.tiny) if r.response or r.chosen]
    train, held_out = corpus.split(records, checkpoint.held_out_names(config.init))
    labeller = Labeller(data.texts_of(train))
    sft = checkpoint.load_language_model(config.init, config.context).to(run.device)
    sft.requires_grad_(False)
    rng = np.random.default_rng(config.seed)
    train = [train[i] for i in rng.permutation(len(train))[:config.prompts]]
    held_out = [held_out[i] for i in rng.permutation(len(held_out))[:config.eval_size]]
    sequences = [collect_rankings(config, run, tokenizer, part, [sft], labeller, training=part is train)
                 for part in (train, held_out)]
    data.require(sequences, config.batch_size, config,
                 wanted="comparisons (.jsonl with prompt + chosen + rejected) or pairs to sample from")
    wrong = sum(len(example.mistakes) for example in sequences[0])
    run.print(f"{int(data.preferences(sequences[0], TIE).sum()):,} comparisons without ties"
              + f", {wrong:,} of them in the wrong order" * bool(config.label_noise))
    if not can_judge([r for r in train if r.chosen]):
        run.print(NO_GOLD)
    chosen = sequences[1]
    names = corpus.names_of(held_out)
    run.print(f"{len(sequences[0]):,} sequences to learn from; held out by name: {len(sequences[1]):,}")
    return Data(tokenizer, sequences[0], chosen, names, sft, labeller)


def examples_of_step(config: Config, loaded: Data, step: int) -> list[data.Example]:
    """What the step reads: batch_size of the sequences."""
    sizes = np.ones(len(loaded.train), dtype=int)
    chosen, _ = data.indices_of_step(sizes, config.batch_size, config.seed, step)
    return [loaded.train[i] for i in chosen]


# ---- 4. model ----------------------------------------------------------------------------------------------

def build_model(config: Config, run: common.Run, tokenizer: Tokenizer) -> torch.nn.Module:
    model = checkpoint.load_language_model(config.init, config.context)
    run.print(f"{model.config.structure}: {model_file.parameter_count(model):,} parameters")
    return model.to(run.device)


# ---- 5. optimizer ------------------------------------------------------------------------------------------

def build_optimizer(config: Config, model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); weight decay on matrices, none on norms, biases and tables."""
    matrices = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


# ---- 6. evaluate -------------------------------------------------------------------------------------------

def answer_logprobs(loaded: Data, model, batch: data.Batch, examples: list[data.Example]) -> tuple:
    """log pi and log pi_ref of every answer, (P, K) both: of the policy and of the reference."""
    structure = loaded.reference.config.structure
    batch_masks = masks.of_batch(structure, batch)
    logprobs_PK = data.answer_logprobs(model(batch, batch_masks, batch.loss_mask), batch, examples)
    with torch.no_grad():
        ref_logits_NV = loaded.reference(batch, batch_masks, batch.loss_mask)
    return logprobs_PK, data.answer_logprobs(ref_logits_NV, batch, examples)


@torch.no_grad()
def evaluate(config: Config, run: common.Run, loaded: Data, model) -> dict[str, float]:
    """On held-out comparisons: agreement of the implicit reward with the labeller, its means, and eval_loss,
    nats per token of the human answers; and what the policy itself writes.
    """
    scored, nats, counted = [], 0.0, 0
    structure = model.config.structure
    for examples in run.batches(loaded.held_out, config.micro_batch_size):
        batch = data.lay_out(examples, structure, config.row, loaded.tokenizer).to(run.device)
        with run.autocast():
            logprobs_PK, ref_logprobs_PK = answer_logprobs(loaded, model, batch, examples)
        scored += zip(examples, (config.beta * (logprobs_PK - ref_logprobs_PK)).tolist())
        human = [p for p, example in enumerate(examples) if example.human]
        nats -= float(logprobs_PK[human, 0].sum())
        counted += sum(len(examples[p].targets[0]) for p in human)
    nats, counted = run.sum([nats, counted]).tolist()
    scored = sum(run.gather(scored), [])
    return {**agreement(scored, {row.origin for row in loaded.train}), **rewards_of_pairs(scored),
            **evaluate_samples(config, run, loaded, model),
            **({"eval_loss": nats / counted} if counted else {})}


def rewards_of_pairs(scored: list[tuple[data.Example, list[float]]]) -> dict[str, float]:
    """Means of the implicit reward over the pairs. Both may fall: the loss asks for the margin alone."""
    pairs = [(rewards[w], rewards[l]) for example, rewards in scored
             for w, l in data.preferences([example], TIE)[0].nonzero().tolist()]
    better, worse = np.mean(pairs, axis=0) if pairs else (0.0, 0.0)
    return {"reward_better": float(better), "reward_worse": float(worse), "margin": float(better - worse)}


def evaluate_samples(config: Config, run: common.Run, loaded: Data, model) -> dict[str, float]:
    """The gold score of sampled and of greedy answers, for the reader alone; eval_kl, nats per sampled
    answer.
    """
    result, decode = {}, loaded.tokenizer.decode
    room = data.room_for_prompt(config, loaded.tokenizer)
    prompts = [row.source for row in loaded.held_out if len(row.source) <= room]
    if not prompts:
        return result
    for name, temperature in (("eval_gold_greedy", 0.0), ("eval_gold", 1.0)):
        answers = generate_many(run, model, prompts, loaded.tokenizer, config.max_new, temperature,
                                config.seed)
        golds = loaded.labeller.golds(map(decode, prompts), map(decode, answers))
        result[name] = float(np.mean(golds))
    kl, samples = 0.0, [data.Example(prompt, [answer]) for prompt, answer in zip(prompts, answers)]
    for examples in run.batches(samples, config.micro_batch_size):
        batch = data.lay_out(examples, model.config.structure, config.row, loaded.tokenizer).to(run.device)
        with run.autocast():
            logprobs_PK, ref_logprobs_PK = answer_logprobs(loaded, model, batch, examples)
        kl += float((logprobs_PK - ref_logprobs_PK).sum())
    return {**result, "eval_kl": float(run.sum(kl)) / len(samples)}


# ---- 7. train ----------------------------------------------------------------------------------------------

def train_step(config: Config, run: common.Run, loaded: Data, model, optimizer, step: int) -> dict:
    """One optimizer step: lay out, mask, read, and divide the loss by what the whole step counts."""
    structure = common.unwrap(model).config.structure
    micro_batches = run.micro_batches(examples_of_step(config, loaded, step), config.micro_batch_size)
    batches = [data.lay_out(part, structure, config.row, loaded.tokenizer) for part in micro_batches]
    counted = run.sum(sum(map(len, micro_batches)))
    total = 0.0
    for i, batch in enumerate(batches):
        batch = batch.to(run.device)
        p, w, l = data.preferences(micro_batches[i], TIE).to(run.device).nonzero(as_tuple=True)
        with common.gradients_meet(model, last=i == len(batches) - 1):
            with run.autocast():
                logprobs_PK, ref_logprobs_PK = answer_logprobs(loaded, model, batch, micro_batches[i])
                losses_M = objectives.dpo_loss(logprobs_PK[p, w], logprobs_PK[p, l],
                                               ref_logprobs_PK[p, w], ref_logprobs_PK[p, l], config.beta)
                loss = (losses_M / torch.bincount(p)[p]).sum()          # a mean over the pairs of each prompt
            (loss / counted * run.world).backward()           # DDP averages over ranks; the loss is a sum
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
    common.check_finite(step, loss=total, gradient=norm)
    optimizer.step()
    optimizer.zero_grad()
    return {"train_loss": float(run.sum(total) / counted), "grad_norm": float(norm),
            "counted": float(counted), "padding": common.padding_share(batches)}


# ---- 8. log ------------------------------------------------------------------------------------------------

def write_samples(config: Config, run: common.Run, loaded: Data, model) -> None:
    """A few held-out examples, and what the model makes of them."""
    decode = loaded.tokenizer.decode
    examples = loaded.held_out[:6]
    answers = answers_to_show(model, examples, loaded.tokenizer, config.seed)
    titles = ("human" if examples[0].human else "chosen", "model")
    rows = [(decode(example.source), decode(example.targets[0]), decode(answer))
            for example, answer in zip(examples, answers)]
    run.write_samples(rows, titles)


# ---- 9. save -----------------------------------------------------------------------------------------------

def main(config: Config) -> dict[str, float]:
    """The stage from beginning to end. Returns the last line of its log."""
    run = set_up(config)
    state = checkpoint.open_folder(run.folder, config)
    if last := run.finished_before(state, config.steps):
        return last
    loaded = load_data(config, run)
    model = build_model(config, run, loaded.tokenizer)
    optimizer = build_optimizer(config, model)
    start = checkpoint.restore(state, model=model, optimizer=optimizer) if state else 0
    first = examples_of_step(config, loaded, start)[0]
    run.print_example(data.show_ranking(first, loaded.tokenizer, start=0))
    checkpoint.open_run(run, config, loaded.tokenizer, loaded.names)
    log = common.Log(run, start)
    wrapped = common.wrap(model, run, config.compile)

    if log.lacks(start, config):                       # it was stopped between a save and this line
        log.line(start, **evaluate(config, run, loaded, model))
    for step in run.progress(range(start, config.steps), "steps"):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, config)
        log.add(train_step(config, run, loaded, wrapped, optimizer, step))
        if common.due(step + 1, config.save_every, config.steps):      # saved first: an evaluation can fail
            checkpoint.save(run, step + 1, config, model.config, model=model, optimizer=optimizer)
        due = common.due(step + 1, config.eval_every, config.steps)
        if due or common.due(step + 1, config.log_every, config.steps):
            log.line(step + 1, **(evaluate(config, run, loaded, model) if due else {}))

    log.curves()
    write_samples(config, run, loaded, model)
    print_sources(run, log.last)
    run.finish(common.first_question(config.out, config.data))
    return log.last


if __name__ == "__main__":
    command_line.run(main, Config, __doc__)

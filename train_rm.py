"""Reward model: learn from rankings which of two answers people prefer.

    data              K answers to each prompt (Ouyang: 4 to 9), the human one and samples of SFT (or of the
                      runs that --sampler names), ranked by the simulated labeller (or --data with prompt +
                      chosen + rejected; of several files a.jsonl,b.jsonl or of records with a key "source"
                      the accuracy is reported for each)
    initial weights   the SFT model, its unembedding replaced by one vector: a scalar per token
    mask              the structure's: causal, prefix or encdec; never across documents
                      (answers to one prompt share its row without seeing each other)
    objective         log sigmoid(r_better - r_worse) over all pairs of a prompt (Ouyang et al. 2022, eq. 1);
                      a gap in the ranking below labeller.TIE is no pair
    what is trained   everything, to score an answer at its last token; then human answers average 0
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
from labeller import TIE, Labeller, agreement, collect_rankings, print_sources
from tokenizer import Tokenizer

# ---- 1. config ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = ""                      # own data, not the default corpus: a file, a folder, or several a,b
    init: str = "runs/sft"              # run folder to start from
    out: str = "runs/rm"                # run folder
    prompts: int = 8000                 # prompts whose answers are ranked
    answers: int = 5                    # answers to each, the human one among them: the paper's K
    sampler: str = ""                   # run folders a,b whose samples are ranked; left empty: init's
    mismatched: int = 1                 # human answers to other prompts, ranked among them in training
    temperature: float = 1.0            # at which answers are sampled
    max_new: int = 40                   # tokens of a sample at most
    label_noise: float = 0.0            # share of training comparisons in the wrong order; people: 0.13-0.16
    steps: int = 1000                   # optimizer steps
    batch_size: int = 8                 # sequences a step, all ranks together; here prompts with all answers
    context: int = 128                  # tokens of prompt and answer at most; max_new of them the answer's
    row: int = 256                      # tokens of a packed row, about: several sequences share one
    lr: float = 1e-3                    # highest learning rate
    warmup: int = 100                   # steps until it is reached; then a cosine down to a tenth
    weight_decay: float = 0.1           # on matrices only
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

    TINY = dict(init="runs/tiny/sft", out="runs/tiny/rm", prompts=100, answers=4, max_new=16, steps=20,
                batch_size=8, warmup=5, eval_every=10, eval_size=20, save_every=10)


# ---- 2. set-up ---------------------------------------------------------------------------------------------

def set_up(config: Config) -> common.Run:
    return common.set_up(config)


# ---- 3. data -----------------------------------------------------------------------------------------------

@dataclass
class Data:
    tokenizer: Tokenizer
    train: list                         # what the steps draw from
    held_out: list                      # examples to evaluate on; no name occurs in both
    names: set                          # the names held out, here and in every later stage


def load_data(config: Config, run: common.Run) -> Data:
    tokenizer = checkpoint.load_tokenizer(config.init, "sft", config.tiny)
    records = [r for r in corpus.load_records(config.data, config.tiny) if r.response or r.chosen]
    train, held_out = corpus.split(records, checkpoint.held_out_names(config.init))
    labeller = Labeller(data.texts_of(train))
    samplers = checkpoint.load_samplers(config, run, tokenizer)
    rng = np.random.default_rng(config.seed)
    train = [train[i] for i in rng.permutation(len(train))[:config.prompts]]
    held_out = [held_out[i] for i in rng.permutation(len(held_out))[:config.eval_size]]
    sequences = [collect_rankings(config, run, tokenizer, part, samplers, labeller, training=part is train)
                 for part in (train, held_out)]
    data.require(sequences, config.batch_size, config,
                 wanted="comparisons (.jsonl with prompt + chosen + rejected) or pairs to sample from")
    wrong = sum(len(example.mistakes) for example in sequences[0])
    run.print(f"{int(data.preferences(sequences[0], TIE).sum()):,} comparisons without ties"
              + f", {wrong:,} of them in the wrong order" * bool(config.label_noise))
    chosen = sequences[1]
    names = corpus.names_of(held_out)
    run.print(f"{len(sequences[0]):,} sequences to learn from; held out by name: {len(sequences[1]):,}")
    return Data(tokenizer, sequences[0], chosen, names)


def examples_of_step(config: Config, loaded: Data, step: int) -> list[data.Example]:
    """What the step reads: batch_size of the sequences."""
    sizes = np.ones(len(loaded.train), dtype=int)
    chosen, _ = data.indices_of_step(sizes, config.batch_size, config.seed, step)
    return [loaded.train[i] for i in chosen]


# ---- 4. model ----------------------------------------------------------------------------------------------

def build_model(config: Config, run: common.Run, tokenizer: Tokenizer) -> torch.nn.Module:
    model = model_file.ScalarModel(checkpoint.load_language_model(config.init, config.context))
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

@torch.no_grad()
def evaluate(config: Config, run: common.Run, loaded: Data, model) -> dict[str, float]:
    """How far the scores of held-out answers agree with the labeller, and how far they go with length."""
    scored = []
    structure = model.config.structure
    for examples in run.batches(loaded.held_out, config.micro_batch_size):
        batch = data.lay_out(examples, structure, config.row, loaded.tokenizer).to(run.device)
        with run.autocast():
            scores_PK = data.by_prompt(model(batch, masks.of_batch(structure, batch), batch.last), batch)
        scored += zip(examples, scores_PK.tolist())
    return agreement(sum(run.gather(scored), []), {row.origin for row in loaded.train})


@torch.no_grad()
def normalise(config: Config, run: common.Run, loaded: Data, model) -> None:
    """Human answers average 0 (Stiennon et al. 2020, section 3.4; Ouyang et al. 2022, section 3.5), all
    answers spread by 1. The loss leaves the shift open; one spread gives PPO's beta one meaning. Where no
    answer is known to be a person's, as in a file of chosen and rejected ones, all answers average 0.
    """
    structure, human, scores = model.config.structure, [], []
    for example in sorted(loaded.train, key=lambda example: not example.human)[:500]:
        batch = data.lay_out([example], structure, config.row, loaded.tokenizer).to(run.device)
        scores.append(model(batch, masks.of_batch(structure, batch), batch.last))
        human += [scores[-1][0]] * example.human
    centred = torch.stack(human) if human else torch.cat(scores)
    model.mean += centred.mean() * model.std
    model.std *= torch.cat(scores).std().clamp(min=1e-6)


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
        preference_PKK = data.preferences(micro_batches[i], TIE).to(run.device)
        with common.gradients_meet(model, last=i == len(batches) - 1):
            with run.autocast():
                scores_PK = data.by_prompt(model(batch, masks.of_batch(structure, batch), batch.last), batch)
                loss = objectives.pairwise_reward_loss(scores_PK, preference_PKK)
            (loss / counted * run.world).backward()           # DDP averages over ranks; the loss is a sum
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
    common.check_finite(step, loss=total, gradient=norm)
    optimizer.step()
    optimizer.zero_grad()
    return {"train_loss": float(run.sum(total) / counted), "grad_norm": float(norm),
            "counted": float(counted), "padding": common.padding_share(batches)}


# ---- 8. log ------------------------------------------------------------------------------------------------

@torch.no_grad()
def write_samples(config: Config, run: common.Run, loaded: Data, model) -> None:
    """A few held-out examples, and what the model makes of them."""
    decode = loaded.tokenizer.decode
    examples = loaded.held_out[:6]
    structure = model.config.structure
    batch = data.lay_out(examples, structure, config.row, loaded.tokenizer).to(run.device)
    scores_PK = data.by_prompt(model(batch, masks.of_batch(structure, batch), batch.last), batch)
    answers = [[f"{score:+.2f} (ranked {rank:.2f})  {decode(target)}" for score, rank, target
                in zip(scores_K, example.ranking, example.targets)]
               for scores_K, example in zip(scores_PK, examples)]
    titles = ("human", "model") if examples[0].human else ("chosen", "rejected")
    run.write_samples(titles=titles, rows=[(decode(example.source), answer[0], "\n".join(answer[1:]))
                       for example, answer in zip(examples, answers)])


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
    if start < config.steps:                           # a finished run that goes on is normalised anew
        model.mean.zero_()
        model.std.fill_(1.0)
    first = examples_of_step(config, loaded, start)[0]
    run.print_example(data.show(first, model.config.structure, loaded.tokenizer))
    checkpoint.open_run(run, config, loaded.tokenizer, loaded.names)
    log = common.Log(run, start)
    wrapped = common.wrap(model, run, config.compile)

    if log.lacks(start, config):                       # it was stopped between a save and this line
        log.line(start, **evaluate(config, run, loaded, model))
    for step in run.progress(range(start, config.steps), "steps"):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, config)
        log.add(train_step(config, run, loaded, wrapped, optimizer, step))
        if step + 1 == config.steps:
            normalise(config, run, loaded, model)
        if common.due(step + 1, config.save_every, config.steps):      # saved first: an evaluation can fail
            checkpoint.save(run, step + 1, config, model.config, model=model, optimizer=optimizer)
        due = common.due(step + 1, config.eval_every, config.steps)
        if due or common.due(step + 1, config.log_every, config.steps):
            log.line(step + 1, **(evaluate(config, run, loaded, model) if due else {}))

    log.curves()
    write_samples(config, run, loaded, model)
    print_sources(run, log.last)
    run.finish("python train_ppo.py" + common.passed_on(config, "--reward", "init"))
    return log.last


if __name__ == "__main__":
    command_line.run(main, Config, __doc__)

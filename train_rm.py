"""Reward model: learn from rankings which of two answers people prefer.

    data              K = 4 ... 9 answers to each prompt, the human one and samples of the SFT model, ranked
                      by the simulated labeller (or --data with prompt + chosen + rejected)
    initial weights   the SFT model, its unembedding replaced by one vector: a scalar per token
    mask              the structure's, and answers to one prompt share its row without seeing each other
    objective         log sigmoid(r_better - r_worse) over all pairs of a prompt (Ouyang et al. 2022, eq. 1)
    what is trained   everything, to score an answer at its last token; then human answers average 0
"""
import math
from dataclasses import dataclass

import numpy as np
import torch

import checkpoint
import common
import data
import masks
import model as model_file
import objectives
from common import UserError
from labeller import TIE, Labeller, collect_rankings

# ---- 1. config ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = ""                      # own data, not the default corpus: .txt, .jsonl, .py or a folder
    init: str = "runs/sft"              # run folder to start from
    out: str = "runs/rm"                # run folder
    resume: str = "auto"                # go on from the run folder's checkpoint: auto, must, never
    overwrite: bool = False             # replace the run that the folder holds
    prompts: int = 6000                 # prompts whose answers are ranked
    answers: int = 5                    # answers to each, the human one among them: the paper's K
    temperature: float = 1.0            # of the samples
    max_new: int = 40                   # tokens of a sample at most
    steps: int = 450                    # optimizer steps
    batch_size: int = 16                # sequences a step, all ranks together; here prompts with all answers
    micro_batch_size: int = 0           # sequences in one forward pass, 0: the whole step
    context: int = 128                  # tokens of a sequence at most; longer ones are dropped
    lr: float = 1e-3                    # highest learning rate
    warmup: int = 10                    # steps until it is reached; then a cosine down to a tenth
    weight_decay: float = 0.0           # on matrices only
    clip: float = 1.0                   # largest norm of the gradient, 0: not clipped
    eval_every: int = 100               # steps between evaluations, 0: only at the end
    eval_size: int = 500                # held-out sequences in an evaluation
    save_every: int = 100               # steps between checkpoints, 0: only at the end
    keep: int = 2                       # checkpoints kept
    seed: int = 1                       # decides weights, order and draws
    device: str = "auto"                # auto, cpu, cuda, mps
    dtype: str = "auto"                 # auto (measured), fp32, bf16
    compile: bool = False               # torch.compile the model
    tiny: bool = False                  # the whole stage in seconds, on a small part of the corpus

    TINY = dict(init="runs/tiny/sft", out="runs/tiny/rm", prompts=100, answers=4, max_new=16, steps=20,
                batch_size=8, warmup=5, eval_every=10, eval_size=20, save_every=10)


# ---- 2. set-up ---------------------------------------------------------------------------------------------

def set_up(config: Config) -> common.Run:
    if not 2 <= config.answers <= 9:
        raise UserError(f"answers is {config.answers}; it must be 2 to 9")
    return common.set_up(config)


# ---- 3. data -----------------------------------------------------------------------------------------------

@dataclass
class Data:
    tokenizer: data.Tokenizer
    train: list                         # what the steps draw from
    held_out: list                      # examples to evaluate on; no name occurs in both
    names: set                          # the names held out, here and in every later stage


def load_data(config: Config, run: common.Run, tokenizer: data.Tokenizer, sft) -> Data:
    records = [r for r in data.load_records(config.data, config.tiny) if r.response or r.chosen]
    train, held_out = data.split(records, checkpoint.held_out_names(config.init))
    labeller = Labeller(data.texts_of([r for r in train if r.response]))
    rng = np.random.default_rng(config.seed)
    parts = [[part[i] for i in rng.permutation(len(part))[:n]]
             for part, n in ((train, config.prompts), (held_out, config.eval_size))]
    sequences = [collect_rankings(config, run, tokenizer, part, sft, labeller) for part in parts]
    data.require(sequences, config.batch_size, "comparisons (prompt + chosen + rejected) or pairs", config)
    run.print(f"{int(data.preferences(sequences[0], TIE).sum()):,} comparisons without ties")
    names = data.names_of(held_out) | checkpoint.held_out_names(config.init)
    run.print(f"{len(sequences[0]):,} sequences to learn from; held out by name: {len(sequences[1]):,}")
    return Data(tokenizer, sequences[0], sequences[1], names)


def examples_of_step(config: Config, loaded: Data, step: int) -> list[data.Group]:
    """What the step reads: batch_size prompts with all their answers."""
    sizes = np.ones(len(loaded.train), dtype=int)
    chosen, _ = data.indices_of_step(sizes, config.batch_size, config.seed, step)
    return [loaded.train[i] for i in chosen]


# ---- 4. model ----------------------------------------------------------------------------------------------

def build_model(config: Config, run: common.Run) -> tuple[model_file.LanguageModel, data.Tokenizer]:
    needed = "python train_sft.py" + " --tiny" * config.tiny
    model, tokenizer = checkpoint.load_model(config.init, first=needed)
    run.print(f"{model.config.structure}: {model_file.parameter_count(model):,} parameters")
    return model.to(run.device), tokenizer


# ---- 5. optimizer ------------------------------------------------------------------------------------------

def build_optimizer(config: Config, model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); weight decay on matrices, none on norms and embeddings."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embedding" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embedding" in name]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


# ---- 6. evaluate -------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(config: Config, run: common.Run, loaded: Data, model) -> dict[str, float]:
    """Share of held-out pairs in the labeller's order: all, sample against sample, human against sample."""
    right, counted = torch.zeros(3), torch.zeros(3)
    for start in range(0, min(len(loaded.held_out), config.eval_size), 64):
        examples = run.mine(loaded.held_out[start:start + 64])
        if not examples:
            continue
        scores_PK = scores_of(config, run, loaded, model, examples).cpu()
        human_P = torch.tensor([group.human for group in examples])
        found = objectives.pairwise_accuracy(scores_PK, data.preferences(examples, TIE), human_P)
        right, counted = right + found[:, 0], counted + found[:, 1]
    right, counted = run.sum(right).tolist(), run.sum(counted).tolist()
    names = ("accuracy", "accuracy_sample_sample", "accuracy_human_sample")
    return {name: a / b for name, a, b in zip(names, right, counted) if b}


def scores_of(config: Config, run: common.Run, loaded: Data, model, groups: list[data.Group]) -> torch.Tensor:
    """(P, K) the model's scalar at the last token of every answer."""
    structure = common.unwrap(model).config.structure
    examples = [(group.prompt, group.answers) for group in groups]
    batch = data.lay_out(examples, structure, 4 * config.context, loaded.tokenizer).to(run.device)
    with run.autocast():
        return data.by_prompt(model(batch, masks.of_batch(structure, batch), batch.last), batch)


@torch.no_grad()
def normalise(config: Config, run: common.Run, loaded: Data, model) -> None:
    """Human answers average 0 (Stiennon et al. 2020, appendix B.1), all answers spread by 1."""
    groups = loaded.train[:500]
    scores = [scores_of(config, run, loaded, model, [group])[0] for group in groups]
    human = [row[0] for row, group in zip(scores, groups) if group.human] or list(torch.cat(scores))
    model.mean += torch.stack(human).mean() * model.std
    model.std *= torch.cat(scores).std().clamp(min=1e-6)


# ---- 7. train ----------------------------------------------------------------------------------------------

def train_step(config: Config, run: common.Run, loaded: Data, model, optimizer, step: int) -> dict:
    """One optimizer step: lay out, mask, read, and divide the loss by what the whole step counts."""
    structure = common.unwrap(model).config.structure
    micro_batches = run.micro_batches(examples_of_step(config, loaded, step), config.micro_batch_size)
    examples = [[(group.prompt, group.answers) for group in part] for part in micro_batches]
    batches = [data.lay_out(part, structure, 4 * config.context, loaded.tokenizer) for part in examples]
    counted = run.sum(sum(map(len, micro_batches)))
    total = 0.0
    for i, batch in enumerate(batches):
        batch = batch.to(run.device)
        batch_masks = masks.of_batch(structure, batch)
        with run.autocast(), common.gradients_meet(model, last=i == len(batches) - 1):
            scores_PK = data.by_prompt(model(batch, batch_masks, batch.last), batch)
            preference_PKK = data.preferences(micro_batches[i], TIE).to(run.device)
            loss = objectives.pairwise_reward_loss(scores_PK, preference_PKK)
            (loss / counted * run.world).backward()           # DDP averages over ranks; the loss is a sum
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
    common.check_finite(step, loss=total, gradient=norm)
    optimizer.step()
    optimizer.zero_grad()
    return {"train_loss": float(run.sum(total) / counted), "gradient": float(norm), "counted": float(counted),
            "padding": common.padding_share(batches)}


# ---- 8. log ------------------------------------------------------------------------------------------------

def write_samples(config: Config, run: common.Run, loaded: Data, model) -> None:
    """A few held-out prompts: every answer with the model's score and its rank."""
    decode = loaded.tokenizer.decode
    examples = loaded.held_out[:6]
    with torch.no_grad():
        scores_PK = scores_of(config, run, loaded, model, examples)
    lines = [[f"{score:+.2f} (labeller {rank:.2f})  {decode(answer)}"
              for score, rank, answer in zip(scores, group.ranking, group.answers)]
             for scores, group in zip(scores_PK, examples)]
    run.write_samples([(decode(group.prompt), rows[0], "\n".join(rows[1:]))
                       for group, rows in zip(examples, lines)])


# ---- 9. save -----------------------------------------------------------------------------------------------

def main(config: Config) -> dict[str, float]:
    """The stage from beginning to end. Returns the last line of its log."""
    run = set_up(config)
    state = checkpoint.open_folder(run.folder, config)
    if state and state["step"] >= config.steps:
        return run.finished_before()
    model, tokenizer = build_model(config, run)
    loaded = load_data(config, run, tokenizer, model)
    model = model_file.ScalarModel(model).to(run.device)
    optimizer = build_optimizer(config, model)
    start = checkpoint.restore(state, model=model, optimizer=optimizer) if state else 0
    first = examples_of_step(config, loaded, start)[0]
    run.print_example(data.show_group(first, loaded.tokenizer))
    common.open_run(run, config, loaded.tokenizer, loaded.names)
    log = common.Log(run, start)
    wrapped = common.wrap(model, run, config.compile)

    for step in run.progress(range(start, config.steps), "steps"):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, config)
        log.add(train_step(config, run, loaded, wrapped, optimizer, step))
        if step + 1 == config.steps:
            normalise(config, run, loaded, model)
        if common.due(step + 1, config.save_every, config.steps):      # saved first: an evaluation can fail
            checkpoint.save(run, step + 1, config, model.config, model=model, optimizer=optimizer)
        if common.due(step + 1, config.eval_every, config.steps):
            log.line(step + 1, **evaluate(config, run, loaded, model))

    log.curves()
    write_samples(config, run, loaded, model)
    run.finish("python train_ppo.py", config.tiny)
    return log.last


if __name__ == "__main__":
    common.run_main(main, Config, __doc__)

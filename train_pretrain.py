"""Pretraining: learn what text is like, one token after another.

    data              all docstrings (or --data text), in packed rows, every document on its own
    initial weights   random, or of a run that is to go on learning (--init)
    mask              the structure's: causal, prefix or encdec; never across documents
    objective         next_token, prefix_lm, span_corruption, ...: turns a text into (source, target)
    what is trained   everything, to predict each target token from what its mask lets it see
"""
import math
from dataclasses import dataclass
from functools import cached_property

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
from generate import answers_to_show
from tokenizer import Tokenizer

# ---- 1. config ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = ""                      # own data, not the default corpus: a file, a folder, or several a,b
    init: str = ""                      # run folder to start from, left empty: random weights
    out: str = "runs/pretrain"          # run folder
    preset: str = ""                    # the variants of a published family (presets.py), in the sizes below
    structure: str = ""                 # causal, prefix or encdec; left empty: the preset's, or causal
    objective: str = "next_token"       # next_token, prefix_lm, span_corruption, bart, glm_130b, ul2, ...
    vocab: int = 2048                   # tokens of the tokenizer trained here, special ones included
    layers: int = 3                     # layers (encdec: of each stack)
    heads: int = 4                      # attention heads
    kv_heads: int = 2                   # key/value heads that they share; with a preset: its proportion
    width: int = 128                    # width of the residual stream
    steps: int = 2000                   # optimizer steps
    batch_size: int = 4                 # sequences a step, all ranks together; here rows of `context` tokens
    context: int = 256                  # tokens of a sequence at most; longer texts are cut
    row: int = 256                      # tokens of a packed row, about: several sequences share one
    lr: float = 3e-3                    # highest learning rate
    warmup: int = 100                   # steps until it is reached; then a cosine down to a tenth
    source_weight: float = 0.0          # loss on source tokens: 0 targets alone, 1 all tokens (causal only)
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

    TINY = dict(out="runs/tiny/pretrain", vocab=512, layers=2, width=64, steps=60, context=128, row=128,
                warmup=10, eval_every=30, eval_size=50, save_every=30)


# ---- 2. set-up ---------------------------------------------------------------------------------------------

def set_up(config: Config) -> common.Run:
    sizes = ("preset", "vocab", "layers", "heads", "kv_heads", "width")
    tiny = Config.TINY if config.tiny else {}
    if config.init and any(getattr(config, x) not in (getattr(Config, x), tiny.get(x)) for x in sizes):
        raise UserError(f"a run that starts from {config.init} has its sizes: leave out {', '.join(sizes)}")
    if not config.init:                             # a slip of the pen is found before the text is read
        model_config(config, config.vocab)
        only_bytes = Tokenizer({bytes([byte]): byte for byte in range(256)})
        data.objective_of(config.objective, only_bytes, config.context)
    return common.set_up(config)


# ---- 3. data -----------------------------------------------------------------------------------------------

@dataclass
class Data:
    tokenizer: Tokenizer
    train: list                         # what the steps draw from
    held_out: list                      # examples to evaluate on; no name occurs in both
    names: set                          # the names held out, here and in every later stage

    @cached_property
    def sizes(self) -> np.ndarray:
        """Tokens of each sequence to draw from, with those that stand around it."""
        return np.array([len(piece) + self.tokenizer.around for piece in self.train])


def load_data(config: Config, run: common.Run) -> Data:
    records = [r for r in corpus.load_records(config.data, config.tiny) if r.text or r.response]
    if config.init:
        tokenizer = checkpoint.load_tokenizer(config.init, "pretrain", config.tiny)
        train, held_out = corpus.split(records, checkpoint.held_out_names(config.init))
    else:
        train, held_out = corpus.split(records)
        tokenizer = data.tokenizer_for(train, config.vocab)
    rng = np.random.default_rng(config.seed)
    sequences = [data.pieces(tokenizer, part, config.context)
                 for part in (train, held_out)]
    data.require(sequences, config.batch_size, config,
                 wanted="texts (.txt, or .jsonl with text)")
    if (n := sum(map(len, sequences[0]))) < (wanted := config.batch_size * config.context):
        raise UserError(f"the text has {n:,} tokens; one step wants batch_size x context = {wanted:,}: "
                        "lower one of them, or bring more text")
    chosen = [sequences[1][i] for i in rng.permutation(len(sequences[1]))[:config.eval_size]]
    objective = data.objective_of(config.objective, tokenizer, config.context)
    chosen = [objective(piece, rng) for piece in chosen]
    names = corpus.names_of(held_out)
    run.print(f"{len(sequences[0]):,} sequences to learn from; held out by name: {len(sequences[1]):,}")
    return Data(tokenizer, sequences[0], chosen, names)


def examples_of_step(config: Config, loaded: Data, step: int) -> list[data.Example]:
    """What the step reads: pieces of text worth batch_size rows, each turned into a pair by the objective."""
    chosen, rng = data.indices_of_step(loaded.sizes, config.batch_size * config.context, config.seed, step)
    objective = data.objective_of(config.objective, loaded.tokenizer, config.context)
    return [objective(loaded.train[i], rng) for i in chosen]


# ---- 4. model ----------------------------------------------------------------------------------------------

def model_config(config: Config, vocab: int) -> model_file.ModelConfig:
    sizes = dict(vocab=vocab, layers=config.layers, heads=config.heads, width=config.width)
    if config.preset:
        return model_file.preset_for(config.preset, config.structure, config.context, **sizes)
    return model_file.ModelConfig(config.structure or "causal", kv_heads=config.kv_heads, **sizes)


def build_model(config: Config, run: common.Run, tokenizer: Tokenizer) -> torch.nn.Module:
    if config.init:
        model = checkpoint.load_language_model(config.init, config.context, config.structure)
        most, denoised = model.config.max_positions, config.objective not in ("next_token", "prefix_lm")
        if denoised and model.config.structure != "encdec" and 0 < most < 2 * config.context:
            raise UserError(f"{config.init} has learned {most} positions; under {config.objective} a row has "
                            f"source and target, of up to {config.context} tokens each: lower the context")
    else:
        model = model_file.build(model_config(config, tokenizer.vocab))
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
    """Nats per target token of held-out examples, and bits per byte of what was predicted."""
    nats = counted = n_bytes = 0
    structure = model.config.structure
    bytes_V = loaded.tokenizer.bytes_per_token().to(run.device)
    for examples in run.batches(loaded.held_out, config.micro_batch_size):
        batch = data.lay_out(examples, structure, config.row, loaded.tokenizer).to(run.device)
        with run.autocast():
            logits_NV = model(batch, masks.of_batch(structure, batch), batch.loss_mask)
        targets_N = batch.targets[batch.loss_mask]
        nats += float(objectives.language_model_loss(logits_NV, targets_N))
        counted += len(targets_N)
        n_bytes += int(bytes_V[targets_N].sum())
    nats, counted, n_bytes = run.sum([nats, counted, n_bytes]).tolist()
    return {"loss": nats / max(1, counted), "bits_per_byte": nats / math.log(2) / max(1, n_bytes)}


# ---- 7. train ----------------------------------------------------------------------------------------------

def train_step(config: Config, run: common.Run, loaded: Data, model, optimizer, step: int) -> dict:
    """One optimizer step: lay out, mask, read, and divide the loss by what the whole step counts."""
    structure = common.unwrap(model).config.structure
    micro_batches = run.micro_batches(examples_of_step(config, loaded, step), config.micro_batch_size)
    batches = [data.lay_out(part, structure, config.row, loaded.tokenizer) for part in micro_batches]
    counted = run.sum(sum(data.loss_weights(batch, structure, config.source_weight).sum()
                          for batch in batches))
    total = 0.0
    for i, batch in enumerate(batches):
        batch = batch.to(run.device)
        weights_BT = data.loss_weights(batch, structure, config.source_weight)
        where_BT = weights_BT > 0
        with common.gradients_meet(model, last=i == len(batches) - 1):
            with run.autocast():
                logits_NV = model(batch, masks.of_batch(structure, batch), where_BT)
                loss = objectives.language_model_loss(logits_NV, batch.targets[where_BT],
                                                      weights_BT[where_BT])
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
    structure = model.config.structure
    examples = data.with_prompts(loaded.held_out[:6], structure)
    answers = answers_to_show(model, examples, loaded.tokenizer, config.seed)
    run.write_samples([(decode(example.source), decode(example.targets[0]), decode(answer))
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
        if common.due(step + 1, config.save_every, config.steps):      # saved first: an evaluation can fail
            checkpoint.save(run, step + 1, config, model.config, model=model, optimizer=optimizer)
        due = common.due(step + 1, config.eval_every, config.steps)
        if due or common.due(step + 1, config.log_every, config.steps):
            log.line(step + 1, **(evaluate(config, run, loaded, model) if due else {}))

    log.curves()
    write_samples(config, run, loaded, model)
    run.finish("python train_sft.py" + common.passed_on(config, "--init"))
    return log.last


if __name__ == "__main__":
    command_line.run(main, Config, __doc__)

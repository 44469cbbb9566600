"""Supervised fine-tuning: the same algorithm as pretraining, on prompts and the answers people wrote.

    data              pairs prompt -> response: a function's signature and its one-line summary (or --data pairs)
    initial weights   the pretrained model
    mask              the structure's, as before
    objective         next token, but only the response and its end token are counted (Ouyang et al. 2022, section 3.5)
    what is trained   everything, with a smaller learning rate
"""
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import common
import data
import masks
import model as model_file
import objectives
from common import UserError
from generate import generate

# ---- 1. config ---------------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = ""                      # own .jsonl with prompt + response, .py or folder instead of the default corpus
    init: str = "runs/pretrain"         # run folder to start from
    out: str = "runs/sft"               # run folder
    resume: str = "auto"                # go on from the run folder's checkpoint: auto, must, never
    overwrite: bool = False             # replace the run that the folder holds
    steps: int = 800                    # optimizer steps
    batch_size: int = 32                # pairs a step, all ranks together
    micro_batch_size: int = 0           # pairs in one forward pass, 0: the whole step
    context: int = 128                  # tokens of a pair at most; longer ones are dropped
    lr: float = 1e-3                    # highest learning rate
    warmup: int = 20                    # steps until it is reached; then a cosine down to a tenth
    weight_decay: float = 0.0           # on matrices only
    clip: float = 1.0                   # largest norm of the gradient
    eval_every: int = 500               # steps between evaluations, 0: only at the end
    eval_size: int = 500                # held-out pairs in an evaluation
    save_every: int = 500               # steps between checkpoints, 0: only at the end
    keep: int = 2                       # checkpoints kept
    seed: int = 1                       # decides order and draws
    device: str = "auto"                # auto, cpu, cuda, mps
    dtype: str = "auto"                 # auto (measured), fp32, bf16
    compile: bool = False               # torch.compile the model
    tiny: bool = False                  # the whole stage in seconds, on a small part of the corpus

    TINY = dict(init="runs/tiny/pretrain", out="runs/tiny/sft", steps=40, warmup=5, eval_every=20, eval_size=50,
                save_every=20)


# ---- 2. set-up ---------------------------------------------------------------------------------------------------

def set_up(config: Config) -> common.Run:
    return common.set_up(config)


# ---- 3. data -----------------------------------------------------------------------------------------------------

@dataclass
class Data:
    tokenizer: data.Tokenizer
    train: list                         # pairs of tokens (prompt, response and its end token)
    held_out: list
    held_out_names: set


def load_data(config: Config, run: common.Run, tokenizer: data.Tokenizer) -> Data:
    records = data.load_records(config.data, config.tiny)
    kept = checkpoint.held_out_names(config.init)
    train, held_out = data.split([record for record in records if record.response], kept)
    if not train or not held_out:
        raise UserError(f"--data {config.data}: fine-tuning wants pairs (.jsonl with prompt + response), and at least two")
    pairs = [data.token_rows(tokenizer, part, ("prompt", "response"), config.context) for part in (train, held_out)]
    if len(pairs[0]) < config.batch_size or not pairs[1]:
        raise UserError(f"of {len(records):,} pairs {len(pairs[0]):,} fit in a context of {config.context} tokens; "
                        f"one step wants batch_size = {config.batch_size}: lower it, or raise the context")
    run.print(f"{len(train):,} pairs, {len(train) - len(pairs[0]):,} dropped as longer than {config.context} tokens; "
              f"held out by name: {len(held_out):,} pairs")
    return Data(tokenizer, *pairs, kept | {record.name for record in held_out})


def examples_of_step(config: Config, loaded: Data, step: int) -> list[data.Example]:
    """What the step reads: batch_size pairs."""
    sizes = np.ones(len(loaded.train), dtype=int)
    chosen, _ = data.indices_of_step(sizes, config.batch_size, config.seed, step)
    pairs = [loaded.train[i] for i in chosen]
    return [(source, [target]) for source, target in pairs]


# ---- 4. model ----------------------------------------------------------------------------------------------------

def build_model(config: Config, run: common.Run) -> tuple[model_file.LanguageModel, data.Tokenizer]:
    model, tokenizer = checkpoint.load_model(config.init, first="python train_pretrain.py" + " --tiny" * config.tiny)
    model = model.to(run.device)
    run.print(f"{model.config.structure}: {model_file.parameter_count(model):,} parameters, from {config.init}")
    return model, tokenizer


# ---- 5. optimizer ------------------------------------------------------------------------------------------------

def build_optimizer(config: Config, model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); weight decay on matrices, none on norms and embeddings."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embedding" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embedding" in name]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


# ---- 6. evaluate -------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(config: Config, run: common.Run, loaded: Data, model) -> dict[str, float]:
    """Nats per target token of held-out answers, and bits per byte of what was predicted."""
    nats = counted = n_bytes = 0
    bytes_V = loaded.tokenizer.bytes_per_token()
    rng = np.random.default_rng(config.seed)
    chosen = [loaded.held_out[i] for i in rng.permutation(len(loaded.held_out))[:config.eval_size]]
    for start in range(0, len(chosen), 64):
        examples = run.mine([(source, [target]) for source, target in chosen[start:start + 64]])
        if not examples:
            continue
        batch = data.lay_out(examples, model.config.structure, config.context, loaded.tokenizer)
        n_bytes += int(bytes_V[batch.targets[batch.loss_mask]].sum())
        batch = batch.to(run.device)
        with run.autocast():
            logits_NV = model(batch, masks.of_batch(model.config.structure, batch), batch.loss_mask)
        nats += float(objectives.language_model_loss(logits_NV, batch.targets[batch.loss_mask]))
        counted += int(batch.loss_mask.sum())
    nats, counted, n_bytes = run.sum([nats, counted, n_bytes]).tolist()
    return {"loss": nats / max(1, counted), "bits_per_byte": nats / math.log(2) / max(1, n_bytes)}


# ---- 7. train ----------------------------------------------------------------------------------------------------

def train_step(config: Config, run: common.Run, loaded: Data, model, optimizer, step: int) -> dict[str, float]:
    """One optimizer step: every micro-batch is laid out, masked, read, and its loss divided by the step's tokens."""
    structure = common.unwrap(model).config.structure
    micro_batches = run.micro_batches(examples_of_step(config, loaded, step), config.micro_batch_size)
    batches = [data.lay_out(examples, structure, config.context, loaded.tokenizer) for examples in micro_batches]
    counted = run.sum(sum(batch.loss_mask.sum() for batch in batches))
    total = 0.0
    for i, batch in enumerate(batches):
        batch = batch.to(run.device)
        batch_masks = masks.of_batch(structure, batch)
        with run.autocast(), common.gradients_meet(model, last=i == len(batches) - 1):
            logits_NV = model(batch, batch_masks, batch.loss_mask)
            loss = objectives.language_model_loss(logits_NV, batch.targets[batch.loss_mask])
            (loss / counted * run.world).backward()           # DDP averages over ranks; the loss is a sum
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
    common.check_finite(step, loss=total, gradient=norm)
    optimizer.step()
    optimizer.zero_grad()
    return {"train_loss": float(run.sum(total) / counted), "gradient": float(norm), "tokens": float(counted)}


# ---- 8. log ------------------------------------------------------------------------------------------------------

def write_samples(config: Config, run: common.Run, loaded: Data, model) -> None:
    """A few held-out functions, described by a human and by the model."""
    pairs = loaded.held_out[:6]
    prompts = [prompt for prompt, _ in pairs]
    continued = generate(model, prompts, loaded.tokenizer, max_new=48, temperature=0.7,
                         generator=torch.Generator(run.device).manual_seed(config.seed))
    run.write_samples([(loaded.tokenizer.decode(prompt), loaded.tokenizer.decode(text), loaded.tokenizer.decode(new))
                       for (prompt, text), new in zip(pairs, continued)])


# ---- 9. save -----------------------------------------------------------------------------------------------------

def main(config: Config) -> dict[str, float]:
    """The stage from beginning to end. Returns the last line of its log."""
    run = set_up(config)
    state = checkpoint.open_folder(run.folder, config)
    model, tokenizer = build_model(config, run)
    loaded = load_data(config, run, tokenizer)
    optimizer = build_optimizer(config, model)
    start = checkpoint.restore(state, model=model, optimizer=optimizer) if state else 0
    run.print_example(data.show(examples_of_step(config, loaded, 0)[0], model.config.structure, loaded.tokenizer))
    common.open_run(run, config, loaded.tokenizer, loaded.held_out_names)
    log = common.Log(run, start)
    wrapped = common.wrap(model, run, config.compile)

    for step in run.progress(range(start, config.steps), "fine-tuning"):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, config)
        log.add(train_step(config, run, loaded, wrapped, optimizer, step))
        if common.due(step + 1, config.save_every, config.steps):       # before the evaluation: it may run out of memory
            checkpoint.save(run, step + 1, config, model.config, model=model, optimizer=optimizer)
        if common.due(step + 1, config.eval_every, config.steps):
            log.line(step + 1, **evaluate(config, run, loaded, model))

    log.curves()
    write_samples(config, run, loaded, model)
    run.print(f"done in {run.seconds():.0f} s: {run.folder}. Next: python train_rm.py" + " --tiny" * config.tiny)
    return log.last


if __name__ == "__main__":
    common.run_main(main, Config, __doc__)

"""Reward model: learn from rankings which of two answers people prefer.

    data              per prompt K = 4 ... 9 candidates, samples of the SFT model and the human answer, ranked by the
                      simulated labeller (or --data with prompt + chosen + rejected)
    initial weights   the SFT model; its unembedding is replaced by one vector: a scalar per token
    mask              the structure's, and candidates of one prompt share a row without seeing each other
    objective         log sigmoid(r_preferred - r_other) over all pairs of a prompt (Ouyang et al. 2022, eq. 1),
                      r read at the answer's last token
    what is trained   everything; afterwards scores are shifted and scaled so that human answers average 0
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
from labeller import TIE, Labeller

# ---- 1. config ---------------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = ""                      # own .jsonl with prompt + chosen + rejected, or prompt + response
    init: str = "runs/sft"              # run folder to start from
    out: str = "runs/rm"                # run folder
    resume: str = "auto"                # go on from the run folder's checkpoint: auto, must, never
    overwrite: bool = False             # replace the run that the folder holds
    prompts: int = 4000                 # prompts whose answers are compared
    candidates: int = 5                 # answers to each: the human one and samples (K of the paper, 4 ... 9)
    temperature: float = 1.0            # of the samples
    max_new: int = 40                   # tokens of a sample at most
    steps: int = 250                    # optimizer steps
    batch_size: int = 16                # prompts a step with all their candidates, all ranks together
    micro_batch_size: int = 0           # prompts in one forward pass, 0: the whole step
    context: int = 128                  # tokens of prompt and answer at most; longer ones are dropped
    lr: float = 1e-3                    # highest learning rate
    warmup: int = 20                    # steps until it is reached; then a cosine down to a tenth
    weight_decay: float = 0.0           # on matrices only
    clip: float = 1.0                   # largest norm of the gradient
    eval_every: int = 500               # steps between evaluations, 0: only at the end
    eval_size: int = 500                # held-out prompts in an evaluation
    save_every: int = 500               # steps between checkpoints, 0: only at the end
    keep: int = 2                       # checkpoints kept
    seed: int = 1                       # decides order and draws
    device: str = "auto"                # auto, cpu, cuda, mps
    dtype: str = "auto"                 # auto (measured), fp32, bf16
    compile: bool = False               # torch.compile the model
    tiny: bool = False                  # the whole stage in seconds, on a small part of the corpus

    TINY = dict(init="runs/tiny/sft", out="runs/tiny/rm", prompts=100, candidates=4, max_new=16, steps=20, warmup=5,
                batch_size=8, eval_every=10, eval_size=20, save_every=10)


# ---- 2. set-up ---------------------------------------------------------------------------------------------------

def set_up(config: Config) -> common.Run:
    if not 2 <= config.candidates <= 9:
        raise UserError(f"candidates is {config.candidates}; it must be 2 to 9")
    return common.set_up(config)


# ---- 3. data -----------------------------------------------------------------------------------------------------

@dataclass
class Group:
    """One prompt and its ranked answers. The ranking is all that training sees."""
    prompt: list[int]
    candidates: list[list[int]]         # with their end tokens; the human answer first where there is one
    ranking: list[float]                # larger is better; the labeller's score, or 1 chosen and 0 rejected
    human: bool


@dataclass
class Data:
    tokenizer: data.Tokenizer
    train: list[Group]
    held_out: list[Group]
    held_out_names: set


def load_data(config: Config, run: common.Run, tokenizer: data.Tokenizer, model) -> Data:
    records = data.load_records(config.data, config.tiny)
    kept = checkpoint.held_out_names(config.init)
    train, held_out = data.split([record for record in records if record.response or record.chosen], kept)
    if not train or not held_out:
        raise UserError(f"--data {config.data}: a reward model wants prompt + chosen + rejected, or prompt + response, "
                        "and at least two of them")
    labeller = Labeller(data.texts_of([record for record in data.split(records, kept)[0] if not record.chosen]))
    groups = [ranked(config, run, part[:size], tokenizer, model, labeller)
              for part, size in ((train, config.prompts), (held_out, config.eval_size))]
    if len(groups[0]) < config.batch_size or not groups[1]:
        raise UserError(f"of {len(records):,} prompts {len(groups[0]):,} fit in a context of {config.context} tokens; "
                        f"one step wants batch_size = {config.batch_size}: lower it, or raise the context")
    n_pairs = sum(int(preferences([group]).sum()) for group in groups[0])
    run.print(f"{len(groups[0]):,} prompts, {n_pairs:,} comparisons, ties dropped; held out by name: {len(groups[1]):,} prompts")
    return Data(tokenizer, *groups, kept | {record.name for record in held_out})


def ranked(config: Config, run: common.Run, records: list, tokenizer, model, labeller: Labeller) -> list[Group]:
    """Records -> groups: given comparisons as they are; human answers joined by samples and ranked by the labeller."""
    given = [record for record in records if record.chosen]
    groups = [Group(prompt, [chosen, rejected], [1.0, 0.0], human=False) for prompt, chosen, rejected in
              data.token_rows(tokenizer, given, ("prompt", "chosen", "rejected"), config.context)]
    written = [record for record in records if record.response]
    rows = data.token_rows(tokenizer, written, ("prompt", "response"), config.context - config.max_new)
    prompts = [prompt for prompt, _ in rows for _ in range(config.candidates - 1)]
    samples = sampled(config, run, prompts, tokenizer, model)
    for i, (prompt, human) in enumerate(rows):
        candidates = [human] + samples[i * (config.candidates - 1):(i + 1) * (config.candidates - 1)]
        text = tokenizer.decode(prompt)
        groups.append(Group(prompt, candidates, [labeller.gold(text, tokenizer.decode(c)) for c in candidates], human=True))
    return groups


def sampled(config: Config, run: common.Run, prompts: list, tokenizer: data.Tokenizer, model) -> list[list[int]]:
    """One answer of the SFT model per prompt. The draws depend on the seed, not on the number of ranks."""
    parts = [prompts[i:i + 256] for i in range(0, len(prompts), 256)]
    mine = {}
    for i in run.progress(run.mine(list(range(len(parts)))), "sampling answers"):
        generator = torch.Generator(run.device).manual_seed(1000 * config.seed + i)
        mine[i] = generate(model, parts[i], tokenizer, config.max_new, config.temperature, generator=generator)
    answers = run.gather(mine)
    return [answer for i in range(len(parts)) for answer in answers[i]]


def preferences(groups: list[Group]) -> torch.Tensor:
    """(P, K, K) bool: [p, w, l] is True where candidate w of prompt p is ranked before l; ties are False both ways."""
    K = max(len(group.ranking) for group in groups)
    ranking_PK = torch.full((len(groups), K), math.nan)
    for p, group in enumerate(groups):
        ranking_PK[p, :len(group.ranking)] = torch.tensor(group.ranking)
    return ranking_PK[:, :, None] - ranking_PK[:, None, :] >= TIE          # comparisons with nan are False


def examples_of_step(config: Config, loaded: Data, step: int) -> list[Group]:
    """What the step reads: batch_size prompts with all their candidates."""
    sizes = np.ones(len(loaded.train), dtype=int)
    chosen, _ = data.indices_of_step(sizes, config.batch_size, config.seed, step)
    return [loaded.train[i] for i in chosen]


# ---- 4. model ----------------------------------------------------------------------------------------------------

def build_model(config: Config, run: common.Run) -> tuple[model_file.LanguageModel, data.Tokenizer]:
    model, tokenizer = checkpoint.load_model(config.init, first="python train_sft.py" + " --tiny" * config.tiny)
    model = model.to(run.device)
    run.print(f"{model.config.structure}: {model_file.parameter_count(model):,} parameters, from {config.init}")
    return model, tokenizer


def scores_of(model, batch: data.Batch, batch_masks: masks.Masks, n_prompts: int) -> torch.Tensor:
    """(P, K) the model's scalar at the last token of every candidate; 0 where a prompt has fewer than K."""
    scores_BT = model(batch, batch_masks)
    document, candidate = batch.document[batch.last], batch.part[batch.last] - 1
    scores_PK = scores_BT.new_zeros(n_prompts, int(candidate.max()) + 1)
    return scores_PK.index_put((document, candidate), scores_BT[batch.last])


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
    """Share of held-out pairs that the model orders as the labeller does: all, sample/sample and human/sample."""
    right, counted = np.zeros(3), np.zeros(3)
    for start in range(0, len(loaded.held_out), 32):
        groups = run.mine(loaded.held_out[start:start + 32])
        if not groups:
            continue
        scores_PK = score(config, run, loaded, model, groups)
        preference_PKK = preferences(groups)
        correct_PKK = preference_PKK & (scores_PK[:, :, None] > scores_PK[:, None, :])
        with_human_PKK = torch.zeros_like(preference_PKK)
        for p, group in enumerate(groups):
            with_human_PKK[p, 0, :] = with_human_PKK[p, :, 0] = group.human
        for i, kind_PKK in enumerate((torch.ones_like(with_human_PKK), ~with_human_PKK, with_human_PKK)):
            right[i] += int((correct_PKK & kind_PKK).sum())
            counted[i] += int((preference_PKK & kind_PKK).sum())
    right, counted = run.sum(right).tolist(), run.sum(counted).tolist()
    names = ("accuracy", "accuracy_sample_sample", "accuracy_human_sample")
    return {name: r / n for name, r, n in zip(names, right, counted) if n}


@torch.no_grad()
def score(config: Config, run: common.Run, loaded: Data, model, groups: list[Group]) -> torch.Tensor:
    """(P, K) scores of these groups' candidates, on the CPU."""
    examples = [(group.prompt, group.candidates) for group in groups]
    batch = data.lay_out(examples, model.config.structure, config.context, loaded.tokenizer).to(run.device)
    with run.autocast():
        return scores_of(model, batch, masks.of_batch(model.config.structure, batch), len(groups)).cpu()


def normalise(config: Config, run: common.Run, loaded: Data, model) -> None:
    """Shift and scale the scores: human answers average 0, all candidates spread by 1 (Stiennon et al. 2020)."""
    groups = loaded.train[:500]
    scores = [(score(config, run, loaded, model, [group])[0], group.human) for group in groups]
    everything = torch.cat([row for row, _ in scores])
    human = torch.stack([row[0] for row, is_human in scores if is_human] or [everything.mean()])
    model.mean += human.mean().to(run.device) * model.std
    model.std *= everything.std().clamp(min=1e-6).to(run.device)


# ---- 7. train ----------------------------------------------------------------------------------------------------

def train_step(config: Config, run: common.Run, loaded: Data, model, optimizer, step: int) -> dict[str, float]:
    """One optimizer step: every micro-batch is laid out, masked, read, and its loss divided by the step's prompts."""
    structure = common.unwrap(model).config.structure
    micro_batches = run.micro_batches(examples_of_step(config, loaded, step), config.micro_batch_size)
    batches = [data.lay_out([(group.prompt, group.candidates) for group in groups], structure, config.context, loaded.tokenizer)
               for groups in micro_batches]
    counted = run.sum(sum(len(groups) for groups in micro_batches))
    total = 0.0
    for i, batch in enumerate(batches):
        batch = batch.to(run.device)
        batch_masks = masks.of_batch(structure, batch)
        with run.autocast(), common.gradients_meet(model, last=i == len(batches) - 1):
            scores_PK = scores_of(model, batch, batch_masks, len(micro_batches[i]))
            loss = objectives.pairwise_reward_loss(scores_PK, preferences(micro_batches[i]).to(run.device))
            (loss / counted * run.world).backward()           # DDP averages over ranks; the loss is a sum
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
    common.check_finite(step, loss=total, gradient=norm)
    optimizer.step()
    optimizer.zero_grad()
    return {"train_loss": float(run.sum(total) / counted), "gradient": float(norm), "prompts": float(counted)}


# ---- 8. log ------------------------------------------------------------------------------------------------------

def write_samples(config: Config, run: common.Run, loaded: Data, model) -> None:
    """A few held-out prompts: every answer with the model's score and the labeller's."""
    groups, rows = loaded.held_out[:6], []
    for group, scores in zip(groups, score(config, run, loaded, model, groups)):
        lines = [f"{r:+.2f} (labeller {gold:.2f}) {loaded.tokenizer.decode(candidate)}"
                 for r, gold, candidate in zip(scores.tolist(), group.ranking, group.candidates)]
        rows.append((loaded.tokenizer.decode(group.prompt), lines[0], "\n".join(lines[1:])))
    run.write_samples(rows)


# ---- 9. save -----------------------------------------------------------------------------------------------------

def main(config: Config) -> dict[str, float]:
    """The stage from beginning to end. Returns the last line of its log."""
    run = set_up(config)
    state = checkpoint.open_folder(run.folder, config)
    model, tokenizer = build_model(config, run)
    loaded = load_data(config, run, tokenizer, model)
    model = model_file.ScalarModel(model).to(run.device)
    optimizer = build_optimizer(config, model)
    start = checkpoint.restore(state, model=model, optimizer=optimizer) if state else 0
    first = examples_of_step(config, loaded, 0)[0]
    run.print_example(data.show((first.prompt, first.candidates), model.config.structure, loaded.tokenizer))
    common.open_run(run, config, loaded.tokenizer, loaded.held_out_names)
    log = common.Log(run, start)
    wrapped = common.wrap(model, run, config.compile)

    for step in run.progress(range(start, config.steps), "reward model"):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, config)
        log.add(train_step(config, run, loaded, wrapped, optimizer, step))
        if step + 1 == config.steps:
            normalise(config, run, loaded, model)
        if common.due(step + 1, config.save_every, config.steps):       # before the evaluation: it may run out of memory
            checkpoint.save(run, step + 1, config, model.config, model=model, optimizer=optimizer)
        if common.due(step + 1, config.eval_every, config.steps):
            log.line(step + 1, **evaluate(config, run, loaded, model))

    log.curves()
    write_samples(config, run, loaded, model)
    run.print(f"done in {run.seconds():.0f} s: {run.folder}. Next: python train_ppo.py" + " --tiny" * config.tiny)
    return log.last


if __name__ == "__main__":
    common.run_main(main, Config, __doc__)

"""PPO: let the model answer, score its answers with the reward model, and make the better ones likelier.

    data              prompts alone (or --data prompts); the answers are the policy's own
    initial weights   policy and frozen reference from SFT, value model from the reward model
    mask              the structure's, as before
    objective         clipped policy gradient (Schulman et al. 2017, eq. 7) on reward - beta KL to reference,
                      plus ptx times the language-model loss (Ouyang et al. 2022, eq. 2), on human answers
    what is trained   the policy and the value model; reference and reward model stay as they are
"""
import copy
import math
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import checkpoint
import command_line
import common
import corpus
import data
import hardware
import masks
import model as model_file
import objectives
import own_reward
from errors import Fault, UserError
from generate import answers_to_show, drawn_from, generate, generate_many
from labeller import NO_GOLD, Labeller, can_judge
from tokenizer import Tokenizer

# ---- 1. config ---------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = ""                      # own data, not the default corpus: a file, a folder, or several a,b
    init: str = "runs/sft"              # run folder to start from
    reward: str = "runs/rm"             # run folder of the reward model, or an own reward: file.py:function
    out: str = "runs/ppo"               # run folder
    no_end: float = 1.0                 # taken off the score of an answer that does not end
    score_clip: float = 0.0             # scores beyond +- this are cut off, 0: none
    beta: float = 0.05                  # price of a nat of KL to the reference, in units of reward
    kl_target: float = 0.0              # nats per answer towards which beta adapts itself, 0: beta is fixed
    kl_estimator: str = "k1"            # a token's KL in the reward: k1; k2 and k3 hardly restrain it
    whiten_rewards: bool = False        # scale the tokens' rewards about their mean; this prices length too
    advantage: str = "gae"              # gae (with a value model); rloo, grpo: answers to a prompt compared
    samples: int = 4                    # answers to each prompt, side by side in its row
    gamma: float = 1.0                  # discount per token
    lam: float = 0.95                   # lambda of generalised advantage estimation
    ratio_clip: float = 0.2             # the policy's probability ratio is clipped to 1 +- this
    value_clip: float = 0.2             # the value may move this far from its old value
    value_init: str = "reward"          # weights of the value model: reward; sft, under a head of zeros
    value_lr: float = 5e-4              # highest learning rate of the value model
    ptx: float = 0.3                    # weight of the language-model loss on human answers, 0: none
    ptx_size: int = 16                  # human answers mixed into every minibatch
    epochs: int = 2                     # passes over the answers of an iteration
    kl_stop: float = 0.0                # no more steps on answers that are so far, nats a token; 0: off
    minibatch_size: int = 64            # answers in an optimizer step
    temperature: float = 1.0            # at which answers are sampled
    max_new: int = 40                   # tokens of a sample at most
    steps: int = 32                     # iterations: sample, score, learn
    batch_size: int = 256               # answers an iteration, all ranks together
    context: int = 128                  # tokens of prompt and answer at most; max_new of them the answer's
    row: int = 256                      # tokens of a packed row, about: several sequences share one
    lr: float = 5e-4                    # highest learning rate
    warmup: int = 10                    # steps until it is reached; then a cosine down to a tenth
    weight_decay: float = 0.0           # on all weights
    adam_eps: float = 1e-8              # of AdamW: added to the root of the second moment
    clip: float = 1.0                   # largest norm of the gradient, 0: not clipped
    eval_every: int = 16                # steps between evaluations, 0: only at the end
    eval_size: int = 500                # held-out sequences in an evaluation
    save_every: int = 16                # steps between checkpoints, 0: only at the end
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

    TINY = dict(init="runs/tiny/sft", reward="runs/tiny/rm", out="runs/tiny/ppo", steps=4, batch_size=16,
                minibatch_size=8, max_new=16, warmup=1, ptx_size=8, eval_every=2, eval_size=20, save_every=2)


# ---- 2. set-up ---------------------------------------------------------------------------------------------

def set_up(config: Config) -> common.Run:
    run = common.set_up(config)
    if config.batch_size % config.minibatch_size:
        raise UserError(f"minibatch_size {config.minibatch_size} must divide batch_size {config.batch_size}")
    if config.kl_target and not config.beta:
        raise UserError("kl_target moves beta by a factor, and beta is 0; give it a beta to begin with")
    if config.ptx_size % run.world:
        raise UserError(f"ptx_size {config.ptx_size} must be a multiple of the {run.world} ranks")
    known = {"advantage": ("gae", "rloo", "grpo"), "kl_estimator": ("k1", "k2", "k3"),
             "value_init": ("reward", "sft")}
    for name, values in known.items():
        if getattr(config, name) not in values:
            raise UserError(f"{name} is {getattr(config, name)!r}; it must be {', '.join(values)}")
    ignored = [name for name in ("gamma", "lam", "value_clip", "value_init", "value_lr")
               if getattr(config, name) != getattr(Config, name)]
    if ignored and config.advantage != "gae":
        raise UserError(f"{', '.join(ignored)}: {config.advantage} compares whole answers and has no value "
                        "model; these belong to --advantage gae")
    if config.whiten_rewards and config.advantage != "gae":
        raise UserError(f"whiten_rewards scales the rewards of tokens; {config.advantage} compares whole "
                        "answers")
    if config.samples < 1 + (config.advantage != "gae"):
        raise UserError(f"samples is {config.samples}; it must be at least 1, and for rloo and grpo, which "
                        "compare the answers to a prompt, at least 2")
    if config.batch_size % config.samples:
        raise UserError(f"samples {config.samples} must divide batch_size {config.batch_size}")
    if run.world > 1 and config.minibatch_size % (config.samples * run.world):
        raise UserError(f"samples {config.samples}, times the {run.world} ranks, must divide minibatch_size "
                        f"{config.minibatch_size}: the answers to a prompt stay on one rank")
    return run


# ---- 3. data -----------------------------------------------------------------------------------------------

@dataclass
class Data:
    tokenizer: Tokenizer
    train: list                         # what the steps draw from
    held_out: list                      # examples to evaluate on; no name occurs in both
    names: set                          # the names held out, here and in every later stage
    pairs: list                         # examples (prompt, [response]) for the mixed-in language-model loss
    labeller: Labeller                  # for the reader of the log alone: nothing is trained on its score


def load_data(config: Config, run: common.Run) -> Data:
    tokenizer = checkpoint.load_tokenizer(config.init, "sft", config.tiny)
    if not own_reward.is_function(config.reward):
        if stopped := checkpoint.stopped_at(config.reward):         # its scores are normalised at its end
            raise UserError(f"{config.reward} was stopped at {stopped}; finish it first: "
                            + checkpoint.command_for("rm", config.reward, config.tiny))
        if checkpoint.load_tokenizer(config.reward, "rm", config.tiny).ranks != tokenizer.ranks:
            raise UserError(f"{config.reward} was trained on other tokens than {config.init}")
    records = [r for r in corpus.load_records(config.data, config.tiny) if r.prompt]
    train, held_out = corpus.split(records, checkpoint.held_out_names(config.init))
    labeller = Labeller(data.texts_of([r for r in train if r.response]))
    rng = np.random.default_rng(config.seed)
    sequences = [data.token_rows(run, tokenizer, part, ("prompt",), config.context - config.max_new)
                 for part in (train, held_out)]
    data.require(sequences, config.batch_size // config.samples, config,
                 wanted="prompts (.jsonl with prompt)", most=config.context - config.max_new)
    pairs, held_out_pairs = (data.token_rows(run, tokenizer, [r for r in part if r.response],
                                             ("prompt", "response"), config.context)
                             for part in (train, held_out))
    room = data.room_for_prompt(config, tokenizer)
    sequences[1] = [pair for pair in held_out_pairs if len(pair.source) <= room] or sequences[1]
    if not can_judge(train):
        run.print(NO_GOLD)
    if config.ptx and not pairs:
        run.print("note: the data has no responses that fit, so no language-model loss is mixed in (ptx)")
    if config.ptx and 0 < len(pairs) < run.world:
        raise UserError(f"ptx mixes in human answers on {run.world} ranks; there are {len(pairs)}: --ptx 0")
    chosen = [sequences[1][i] for i in rng.permutation(len(sequences[1]))[:config.eval_size]]
    names = corpus.names_of(held_out)
    run.print(f"{len(sequences[0]):,} sequences to learn from; held out by name: {len(sequences[1]):,}")
    return Data(tokenizer, sequences[0], chosen, names, pairs, labeller)


def examples_of_step(config: Config, loaded: Data, step: int) -> list[data.Example]:
    """What the step reads: as many prompts as give batch_size answers."""
    sizes = np.ones(len(loaded.train), dtype=int)
    chosen, _ = data.indices_of_step(sizes, config.batch_size // config.samples, config.seed, step)
    return [loaded.train[i] for i in chosen]


def pairs_of_update(config: Config, loaded: Data, update: int) -> list[data.Example]:
    """The human answers mixed into an optimizer step."""
    sizes = np.ones(len(loaded.pairs), dtype=int)
    chosen, _ = data.indices_of_step(sizes, config.ptx_size, config.seed + 1, update)
    return [loaded.pairs[i] for i in chosen]


# ---- 4. model ----------------------------------------------------------------------------------------------

class FourModels(torch.nn.Module):
    """The networks of PPO. policy and value are trained, and may be wrapped (DDP, compiled).

    reward: a reward model, or an own function in its place. value_init "reward" starts the value model as a
    copy of it (Stiennon et al. 2020, appendix B.1; Ouyang et al. 2022, appendix C.4), "sft" as a copy of the
    policy under a head of zeros, which says 0 before it has learnt (the code of Ziegler et al. 2019). An own
    reward has no weights to copy: then it is "sft". "none": RLOO and GRPO have no value model.
    """

    def __init__(self, policy: model_file.LanguageModel, reward: torch.nn.Module, value_init: str = "reward"):
        super().__init__()
        self.config = policy.config
        self.policy, self.reference = policy, copy.deepcopy(policy).requires_grad_(False)
        self.reward, self.value = reward.requires_grad_(False), None
        if value_init == "reward" and not isinstance(reward, own_reward.RewardFunction):
            self.value = copy.deepcopy(reward).requires_grad_(True)
        elif value_init != "none":
            self.value = model_file.ScalarModel(copy.deepcopy(policy)).requires_grad_(True)
            torch.nn.init.zeros_(self.value.head.weight)


def build_model(config: Config, run: common.Run, tokenizer: Tokenizer) -> torch.nn.Module:
    policy = checkpoint.load_language_model(config.init, config.context)
    value_init = config.value_init if config.advantage == "gae" else "none"
    if own_reward.is_function(config.reward):
        reward = own_reward.RewardFunction(config.reward, tokenizer, run)
    else:
        reward = checkpoint.load_model(config.reward, config.context)
        if not isinstance(reward, model_file.ScalarModel):
            raise UserError(f"{config.reward} is no reward model; first run: "
                            + checkpoint.command_for("rm", Path(config.init).with_name("rm"), config.tiny))
        if reward.config.structure != policy.config.structure:
            raise UserError(f"{config.reward} is {reward.config.structure}, {config.init} is "
                            f"{policy.config.structure}: they read an answer from one row, laid out for both")
    model = FourModels(policy, reward, value_init)
    networks = [network for network in model.children() if not isinstance(network, own_reward.RewardFunction)]
    run.print(f"{model.config.structure}: {model_file.parameter_count(policy):,} parameters, "
              f"{len(networks)} times")
    return model.to(run.device)


def networks_that_learn(model: FourModels) -> dict[str, torch.nn.Module]:
    """What learns and is saved, by its name in the checkpoint."""
    return {"model": model.policy} | ({} if model.value is None else {"value": model.value})


# ---- 5. optimizer ------------------------------------------------------------------------------------------

def build_optimizer(config: Config, model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), one for both networks, each with its own learning rate.

    beta, which adapts itself where there is a kl_target, is kept here: so it is saved and resumed.
    """
    groups = [{"params": model.policy.parameters(), "highest": config.lr, "beta": config.beta}]
    if model.value is not None:
        groups.append({"params": model.value.parameters(), "highest": config.value_lr})
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), eps=config.adam_eps,
                             weight_decay=config.weight_decay, fused=True)


# ---- 6. evaluate -------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(config: Config, run: common.Run, loaded: Data, model) -> dict[str, float]:
    """On held-out prompts: the gold score of sampled and of greedy answers; the loss on the human ones."""
    policy, result = common.unwrap(model.policy), {}
    structure = policy.config.structure
    prompts = [example.source for example in loaded.held_out]
    for name, temperature in (("eval_gold", config.temperature), ("eval_gold_greedy", 0.0)):
        answers = generate_many(run, policy, prompts, loaded.tokenizer, config.max_new, temperature,
                                config.seed)
        result[name] = float(np.mean(golds_of(loaded, prompts, answers)))
    nats = counted = 0
    answered = [example for example in loaded.held_out if example.targets]
    for examples in run.batches(answered, config.micro_batch_size):
        batch = data.lay_out(examples, structure, config.row, loaded.tokenizer).to(run.device)
        with run.autocast():
            logits_NV = policy(batch, masks.of_batch(structure, batch), batch.loss_mask)
        nats += float(objectives.language_model_loss(logits_NV, batch.targets[batch.loss_mask]))
        counted += int(batch.loss_mask.sum())
    nats, counted = run.sum([nats, counted]).tolist()
    return {**result, "eval_loss": nats / counted} if counted else result


def golds_of(loaded: Data, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
    """The labeller's scores, for the log."""
    decode = loaded.tokenizer.decode
    return loaded.labeller.golds(map(decode, prompts), map(decode, answers))


# ---- 7. train ----------------------------------------------------------------------------------------------

@dataclass
class Rollout:
    """Answers that are read together, and what was known when they were sampled. Tensors (B, T)."""
    batch: data.Batch
    masks: masks.Masks
    actions: torch.Tensor               # True at the positions whose prediction was sampled
    last_action: torch.Tensor           # True at the last of each answer
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor                # the reward model's, at last_action
    rewards: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None


def train_step(config: Config, run: common.Run, loaded: Data, model, optimizer, step: int) -> dict:
    """One iteration: sample answers, score them, estimate advantages, learn from them for some epochs."""
    prompts = [example.source for example in run.mine(examples_of_step(config, loaded, step))
               for _ in range(config.samples)]
    answers = sample(config, run, loaded, model, prompts, step)
    n, size = config.minibatch_size // run.world, answers_at_once(config, run)
    parts = [[slice(i, min(i + size, end)) for i in range(end - n, end, size)]
             for end in range(n, len(prompts) + 1, n)]
    minibatches = [[score(config, run, loaded, model, prompts[at], answers[at]) for at in part]
                   for part in parts]
    rollouts = [rollout for minibatch in minibatches for rollout in minibatch]
    settings = optimizer.param_groups[0]
    estimate_advantages(config, run, rollouts, settings["beta"])
    metrics = describe(run, loaded, prompts, answers, rollouts)
    metrics["padding"] = common.padding_share([rollout.batch for rollout in rollouts])
    if config.kl_target:
        settings["beta"] = objectives.adapted_beta(settings["beta"], metrics["kl"], config.kl_target)
        metrics["beta"] = settings["beta"]
    metrics |= learn(config, run, loaded, model, optimizer, minibatches, step)
    if model.value is None:                            # RLOO and GRPO
        del metrics["value_loss"], metrics["explained_variance"]
    return metrics


def answers_at_once(config: Config, run: common.Run) -> int:
    """How many this rank reads in one forward pass: its share of a minibatch, or a micro-batch of it."""
    n = config.minibatch_size // run.world
    return min(n, config.micro_batch_size or n)


def sample(config: Config, run: common.Run, loaded: Data, model, prompts, step: int) -> list:
    """The policy's own answers. The draws are a function of seed, step and rank."""
    generator = torch.Generator(run.device).manual_seed((config.seed * 100_003 + step) * 1_009 + run.rank)
    policy = common.unwrap(model.policy)
    with run.autocast(sampling=True):
        return generate(policy, prompts, loaded.tokenizer, config.max_new, config.temperature,
                        generator=generator)


def answer_logits(config: Config, loaded: Data, network, batch: data.Batch, batch_masks: masks.Masks,
                  actions_BT: torch.Tensor) -> torch.Tensor:
    """Logits (N, V) of the distribution that sample() draws from: at its temperature, over its tokens."""
    logits_NV = network(batch, batch_masks, actions_BT)
    return drawn_from(logits_NV, loaded.tokenizer, config.temperature)


@torch.no_grad()
def score(config: Config, run: common.Run, loaded: Data, model, prompts, answers) -> Rollout:
    """Lay some answers out, once, and let the four networks read them.

    Learning reads the very same layout, so on the first minibatch the ratio is 1 to the last bit.
    """
    structure = common.unwrap(model.policy).config.structure
    examples = data.answers_of_prompts(prompts, answers, structure, config.row, loaded.tokenizer)
    batch = data.lay_out(examples, structure, config.row, loaded.tokenizer).to(run.device)
    batch_masks, actions_BT = masks.of_batch(structure, batch), batch.loss_mask
    targets_N = batch.targets[actions_BT]
    with run.autocast():
        logits_NV = answer_logits(config, loaded, model.policy, batch, batch_masks, actions_BT)
        ref_logits_NV = answer_logits(config, loaded, model.reference, batch, batch_masks, actions_BT)
        values_N = (model.value(batch, batch_masks, actions_BT) if config.advantage == "gae"
                    else torch.zeros(len(targets_N), device=run.device))
        if isinstance(model.reward, own_reward.RewardFunction):
            scores_M = model.reward(prompts, answers).to(run.device)[data.answer_of_token(batch, batch.last)]
        else:
            scores_M = model.reward(batch, batch_masks, batch.last)
    if config.score_clip:
        scores_M = scores_M.clamp(-config.score_clip, config.score_clip)
    scores_M = scores_M - config.no_end * (batch.tokens[batch.last] != loaded.tokenizer.end)
    # subtle: the reward is read where the last token stands, and paid where it was chosen: one before
    last_action_BT = torch.roll(batch.last, -1, dims=1)
    zeros_BT = torch.zeros(actions_BT.shape, device=run.device)
    place = partial(zeros_BT.masked_scatter, actions_BT)                    # (N,) -> (B, T)
    return Rollout(batch, batch_masks, actions_BT, last_action_BT,
                   logprobs=place(objectives.token_logprobs(logits_NV, targets_N)),
                   ref_logprobs=place(objectives.token_logprobs(ref_logits_NV, targets_N)),
                   entropy=place(objectives.entropy(logits_NV)), values=place(values_N),
                   scores=zeros_BT.masked_scatter(last_action_BT, scores_M))


def estimate_advantages(config: Config, run: common.Run, rollouts: list[Rollout], beta: float) -> None:
    """Rewards with the KL penalty, advantages, returns."""
    for r in rollouts:
        k1, k2, k3 = objectives.kl_estimates(r.logprobs, r.ref_logprobs)
        kl_BT = {"k1": k1, "k2": k2, "k3": k3}[config.kl_estimator]
        r.rewards = objectives.kl_penalised_rewards(r.scores, kl_BT, r.actions, r.last_action, beta)
    if config.whiten_rewards:
        whiten_together(run, rollouts, "rewards", shift_mean=False)
    if config.advantage != "gae":
        return compare_answers(config, rollouts)
    for r in rollouts:
        r.advantages = objectives.gae(r.rewards, r.values, r.actions, r.last_action, config.gamma, config.lam)
        r.returns = r.advantages + r.values
    whiten_together(run, rollouts, "advantages")


def whiten_together(run: common.Run, rollouts: list[Rollout], name: str, shift_mean: bool = True) -> None:
    """Whiten over all tokens of the iteration, those of the other ranks too."""
    x_N = torch.cat([getattr(r, name)[r.actions] for r in rollouts]).to(hardware.widest(run.device))
    n, total, squares = run.sum(torch.stack([torch.ones_like(x_N).sum(), x_N.sum(), (x_N ** 2).sum()]))
    mean, var = (total / n).float(), (squares / n - (total / n) ** 2).float()
    for r in rollouts:
        setattr(r, name, objectives.whiten(getattr(r, name), (mean, var), shift_mean) * r.actions)


def compare_answers(config: Config, rollouts: list[Rollout]) -> None:
    """RLOO or GRPO: the other answers to the prompt take the value model's place."""
    answers = [data.answer_of_token(r.batch, r.actions) for r in rollouts]                          # (N,)
    totals = [torch.zeros(int(answer_N.max()) + 1, device=answer_N.device)
              .index_add(0, answer_N, r.rewards[r.actions]) for r, answer_N in zip(rollouts, answers)]
    compare = {"rloo": objectives.leave_one_out, "grpo": objectives.group_relative}[config.advantage]
    advantages_PK = compare(torch.cat(totals).view(-1, config.samples))
    parts = advantages_PK.flatten().split([len(total) for total in totals])
    for r, answer_N, part in zip(rollouts, answers, parts):
        r.advantages = torch.zeros_like(r.rewards).masked_scatter(r.actions, part[answer_N])
        r.returns = r.values


def learn(config: Config, run: common.Run, loaded: Data, model, optimizer, minibatches: list[list[Rollout]],
          step: int) -> dict:
    """Some epochs over the minibatches: an optimizer step each."""
    done, n = [], config.epochs * len(minibatches)
    for i in range(n):
        rollouts = minibatches[i % len(minibatches)]
        done.append(update(config, run, loaded, model, optimizer, rollouts, step * n + i, step))
        if i == 0:
            off = max(run.gather(done[0]["off"]))
            if off > 1e-3 * (1 if run.dtype == torch.float32 else 100):
                raise Fault(f"on the first minibatch the ratio differs from 1 by {off:.2g}: what learns is "
                            "not the policy that was scored")
        if stopped := too_far(config, done[-1]["approx_kl"]):
            break
    means = {name: float(np.mean([metrics[name] for metrics in done])) for name in done[0] if name != "off"}
    return {**means, "ratio": done[0]["ratio"], "updates": len(done) - stopped}


def too_far(config: Config, approx_kl: float) -> bool:
    """Whether this step is not to be taken, nor any after it in the iteration (Spinning Up: at 1.5 times its
    target_kl, and for the policy alone).
    """
    return 0 < config.kl_stop < approx_kl


def update(config: Config, run: common.Run, loaded: Data, model, optimizer, minibatch: list[Rollout],
           number: int, step: int = 0) -> dict[str, float]:
    """One optimizer step: policy loss and value loss on a minibatch, and the language-model loss mixed in. It
    is not taken where the policy is too far from its answers. number: of the update in the run, step: of its
    iteration.
    """
    counted = run.sum(sum(r.actions.sum() for r in minibatch))
    mixed = config.ptx > 0 and bool(loaded.pairs)
    totals, off = torch.zeros(5, device=run.device), 0.0
    for i, r in enumerate(minibatch):
        last, old_logprobs_N = i == len(minibatch) - 1, r.logprobs[r.actions]
        with common.gradients_meet(model.policy, last=last and not mixed):
            with run.autocast():
                logits_NV = answer_logits(config, loaded, model.policy, r.batch, r.masks, r.actions)
            logprobs_N = objectives.token_logprobs(logits_NV, r.batch.targets[r.actions])
            policy_loss = objectives.clipped_policy_loss(logprobs_N, old_logprobs_N, r.advantages[r.actions],
                                                         config.ratio_clip).sum()
            (policy_loss / counted * run.world).backward()        # DDP averages over ranks; the loss is a sum
        value_loss = torch.zeros((), device=run.device)
        if config.advantage == "gae":
            with common.gradients_meet(model.value, last=last):
                with run.autocast():
                    values_N = model.value(r.batch, r.masks, r.actions)
                value_loss = objectives.clipped_value_loss(values_N, r.values[r.actions],
                                                           r.returns[r.actions], config.value_clip).sum()
                (value_loss / counted * run.world).backward()
        ratio_N = (logprobs_N - old_logprobs_N).detach().exp()
        clipped = ((ratio_N - 1).abs() > config.ratio_clip).sum()
        kl = objectives.kl_estimates(old_logprobs_N, logprobs_N.detach())[2].sum()
        totals += torch.stack([policy_loss.detach(), value_loss.detach(), clipped, ratio_N.sum(), kl])
        off = max(off, float((ratio_N - 1).abs().max()))
    ptx_loss = mix_in(config, run, loaded, model.policy, number) if mixed else 0.0
    norms = [torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip or math.inf)
             for network in networks_that_learn(model).values()]
    common.check_finite(step, loss=totals.sum() + ptx_loss, gradient=sum(norms))
    names = ("policy_loss", "value_loss", "clip_fraction", "ratio", "approx_kl")
    metrics = dict(zip(names, (run.sum(totals) / counted).tolist()))
    if not too_far(config, metrics["approx_kl"]):
        optimizer.step()
    optimizer.zero_grad()
    return {**metrics, "ptx_loss": float(ptx_loss), "off": off}


def mix_in(config: Config, run: common.Run, loaded: Data, policy, number: int) -> float:
    """PPO-ptx: ptx times the loss on human answers keeps the policy from forgetting how people write."""
    structure = common.unwrap(policy).config.structure
    parts = run.micro_batches(pairs_of_update(config, loaded, number), config.micro_batch_size)
    batches = [data.lay_out(part, structure, config.row, loaded.tokenizer) for part in parts]
    counted, total = run.sum(sum(batch.loss_mask.sum() for batch in batches)), 0.0
    for i, batch in enumerate(batches):
        batch = batch.to(run.device)
        with common.gradients_meet(policy, last=i == len(batches) - 1):
            with run.autocast():
                logits_NV = policy(batch, masks.of_batch(structure, batch), batch.loss_mask)
                loss = objectives.language_model_loss(logits_NV, batch.targets[batch.loss_mask])
            (config.ptx * loss / counted * run.world).backward()
        total += loss.detach()
    return float(run.sum(total) / counted)


# ---- 8. log ------------------------------------------------------------------------------------------------

def describe(run: common.Run, loaded: Data, prompts, answers, rollouts: list[Rollout]) -> dict[str, float]:
    """The iteration's answers in figures: means over answers, over tokens for entropy."""
    score, entropy = (sum(getattr(r, name).sum() for r in rollouts) for name in ("scores", "entropy"))
    kl = sum((r.logprobs - r.ref_logprobs).sum() for r in rollouts)      # where no action is, all are 0
    ended = sum(answer[-1] == loaded.tokenizer.end for answer in answers)
    n_tokens = sum(map(len, answers))
    repeated = sum(len(answer) - len(set(answer)) for answer in answers)
    sums = run.sum([len(answers), n_tokens, score, kl, entropy, ended,
                    sum(golds_of(loaded, prompts, answers)), repeated]).tolist()
    mine = torch.stack([torch.cat([getattr(r, name)[r.actions] for r in rollouts])
                        for name in ("values", "returns")]).cpu()
    values, returns = torch.cat(run.gather(mine), dim=1)
    n, n_tokens, score, kl, entropy, ended, gold, repeated = sums
    return {"reward": score / n, "gold": gold / n, "kl": kl / n, "entropy": entropy / n_tokens,
            "length": n_tokens / n, "ended": ended / n, "repetition": repeated / n_tokens,
            "explained_variance": float(objectives.explained_variance(values, returns))}


def warnings_of(now: dict[str, float], first: dict[str, float]) -> list[str]:
    """What a reader of the log should look at: the usual traces of a reward that is being exploited.

    first: the figures of the first iteration, when the policy was still the reference. Reward and loss do not
    tell; length and KL do (Zheng et al. 2023, section 5.2), and repetition, entropy and the share that ends.
    """
    signs = [
        (not 0.6 < now["length"] / first["length"] < 1.5,
         f"answers are {now['length']:.0f} tokens long, at first {first['length']:.0f}"),
        (now["repetition"] > first["repetition"] + 0.1,
         f"{now['repetition']:.0%} of the tokens of an answer repeat others, "
         f"at first {first['repetition']:.0%}"),
        (now["ended"] < first["ended"] - 0.1,
         f"only {now['ended']:.0%} of the answers end, at first {first['ended']:.0%}"),
        (now["entropy"] < 0.5 * first["entropy"],
         f"the entropy is {now['entropy']:.2f} nats a token, at first {first['entropy']:.2f}"),
        (now["kl"] > 15, f"the KL to the reference is {now['kl']:.0f} nats an answer")]
    return [text for holds, text in signs if holds]


def show_answer(config: Config, run: common.Run, loaded: Data, model) -> None:
    """One example; of an own reward, which may fail, as many as are read at once, before anything is
    written.
    """
    n = answers_at_once(config, run) if own_reward.is_function(config.reward) else 1
    prompts = [example.source for example in run.mine(examples_of_step(config, loaded, step=0))][:n]
    answers = sample(config, run, loaded, model, prompts, step=0)
    rollout = score(config, run, loaded, model, prompts, answers)
    first = data.answer_of_token(rollout.batch, rollout.last_action) == 0
    decode, value = loaded.tokenizer.decode, float(rollout.scores[rollout.last_action][first])
    ended = "<end>" * (answers[0][-1] == loaded.tokenizer.end)
    run.print_example(f"{decode(prompts[0])}[[{decode(answers[0])}{ended}]]   reward {value:+.2f}")


def write_samples(config: Config, run: common.Run, loaded: Data, model) -> None:
    """A few held-out examples, and what the model makes of them."""
    decode = loaded.tokenizer.decode
    examples = loaded.held_out[:6]
    answers = answers_to_show(common.unwrap(model.policy), examples, loaded.tokenizer, config.seed)
    run.write_samples([(decode(example.source), decode(sum(example.targets, [])), decode(answer))
                       for example, answer in zip(examples, answers)])


# ---- 9. save -----------------------------------------------------------------------------------------------

def following(config: Config) -> str:
    """The report, where the run stands among the other stages' as it expects them and is of the default
    corpus; else a first question.
    """
    folder = Path(config.out)
    if folder.name != "ppo" or config.data:
        return common.first_question(config.out, config.data)
    usual = config.out == (Config.TINY["out"] if config.tiny else Config.out)
    runs = shlex.quote(str(folder.parent))
    return "python evaluate.py" + f" --runs {runs}" * (not usual) + " --tiny" * config.tiny


def main(config: Config) -> dict[str, float]:
    """The stage from beginning to end. Returns the last line of its log."""
    run = set_up(config)
    state = checkpoint.open_folder(run.folder, config)
    if last := run.finished_before(state, config.steps):
        return last
    loaded = load_data(config, run)
    model = build_model(config, run, loaded.tokenizer)
    networks, optimizer = networks_that_learn(model), build_optimizer(config, model)
    start = checkpoint.restore(state, **networks, optimizer=optimizer) if state else 0
    show_answer(config, run, loaded, model)
    checkpoint.open_run(run, config, loaded.tokenizer, loaded.names)
    log = common.Log(run, start)
    model.policy, model.value = (network if network is None else common.wrap(network, run, config.compile)
                                 for network in (model.policy, model.value))
    if config.compile:                                 # or its rounding would not be the policy's
        model.reference = torch.compile(model.reference)

    if log.lacks(start, config):                       # it was stopped between a save and this line
        log.line(start, **evaluate(config, run, loaded, model))
    for step in run.progress(range(start, config.steps), "steps"):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, config, group["highest"])
        log.add(train_step(config, run, loaded, model, optimizer, step))
        if common.due(step + 1, config.save_every, config.steps):      # saved first: an evaluation can fail
            checkpoint.save(run, step + 1, config, model.config, **networks, optimizer=optimizer)
        due = common.due(step + 1, config.eval_every, config.steps)
        log.line(step + 1, **(evaluate(config, run, loaded, model) if due else {}))
        if "length" in log.first and (signs := warnings_of(log.last, log.first)):
            run.print("look at samples: " + "; ".join(signs))

    log.curves()
    write_samples(config, run, loaded, model)
    run.finish(following(config))
    return log.last


if __name__ == "__main__":
    command_line.run(main, Config, __doc__)

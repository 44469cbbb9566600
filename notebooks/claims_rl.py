"""The measurements of claims.py about rewards and reinforcement learning."""
import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np

from claims_text import judge_of
from flow import Flow, data_of, metrics_of, rivals_of, row_of_best, rows_of, write_pairs, write_records

import checkpoint
import corpus
import evaluate
import labeller
import train_dpo
import train_pretrain
import train_ppo
import train_rm
import train_sft
from errors import Fault

# ---- PPO against its rivals --------------------------------------------------------------------------------

def rl_against_sft(flow: Flow) -> list[dict]:
    """RL beats SFT at equal parameters: gold score of PPO, SFT, and SFT's honest rivals."""
    study = flow.study()
    best = flow.sft("sft_on_best", init=flow.sft(), data=best_answers(flow, study),
                    **flow.steps(train_sft, 0.25), lr=1e-3)
    folders = {"sft_on_best": best, "dpo": dpo_of(flow), "ppo": flow.ppo(),
               "ppo_no_ptx": flow.ppo("ppo_no_ptx", ptx=0.0)}
    models = {name: checkpoint.load_model(folder) for name, folder in folders.items()}
    rivals = rivals_of(study)
    rows = rows_of(study, rivals, {"sft": study.reference} | models)
    cooled = {t: evaluate.answers_of(study, study.reference, t) for t in (0.2, 0.35, 0.5, 0.7)}
    temperature = max(cooled, key=lambda t: evaluate.golds_of(study, cooled[t]).mean())
    rows["sft_cool"] = evaluate.row_of(study, cooled[temperature], None, study.reference, rivals, temperature)
    rows["sft_cool"]["temperature"] = temperature
    rows["best_of_n"] = row_of_best(study, rivals)
    rows["human"] = evaluate.row_of(study, study.human, None, None, rivals)
    return [{"row": name, **row} for name, row in rows.items()]


def best_answers(flow: Flow, study: evaluate.Study) -> str:
    """A .jsonl with the best of n samples to each of 4000 prompts, as the reward model sees it. (SFT on it
    holds out the same names as ever.)
    """
    path = flow.folder / f"best_of_{study.config.best_of}.jsonl"
    if not path.exists():
        records = [r for r in corpus.load_records(flow.config.data, flow.config.tiny) if r.response]
        rng = np.random.default_rng(flow.seed)
        chosen = [records[i] for i in rng.permutation(len(records))[:4000]]
        prompts = study.tokenizer.encode_all([record.prompt for record in chosen])
        answers = evaluate.best_of_n(dataclasses.replace(study, prompts=prompts))
        texts = [study.tokenizer.decode(answer) for answer in answers]
        write_pairs(path, [(record.prompt, text) for record, text in zip(chosen, texts) if text])
    return str(path)


def relevance(flow: Flow) -> list[dict]:
    """What PPO costs in relevance (the share of the identifier's words), and what wins it back."""
    study = flow.study()
    plain = flow.rm("rm_not_mismatched", mismatched=0)
    longer, dpo = flow.rm("rm_two_epochs", steps=flow.steps(train_rm, 2)["steps"]), dpo_of(flow)
    folders = {"ppo": flow.ppo(), "ptx 0": flow.ppo("ppo_no_ptx", ptx=0.0),
               "ptx 1": flow.ppo("ppo_ptx_1", ptx=1.0), "beta 0.1": flow.ppo("ppo_beta_0.1", beta=0.1),
               "reward model without mismatched answers": flow.ppo("ppo_not_mismatched", reward=plain),
               "reward model of two epochs": flow.ppo("ppo_two_epochs", reward=longer),
               "DPO": dpo, "PPO that starts from DPO": flow.ppo("ppo_from_dpo", init=dpo),
               "PPO that starts from DPO, ptx 0.4": flow.ppo("ppo_from_dpo_ptx_0.4", init=dpo, ptx=0.4),
               "PPO that starts from DPO, ptx 0.5": flow.ppo("ppo_from_dpo_ptx_0.5", init=dpo, ptx=0.5)}
    models = {name: checkpoint.load_model(folder) for name, folder in folders.items()}
    rows = rows_of(study, rivals_of(study), {"sft": study.reference} | models)
    return [{"row": name, **row} for name, row in rows.items()]


def dpo_of(flow: Flow) -> str:
    """DPO on half of the comparisons."""
    return flow.train(train_dpo, "dpo", init=flow.sft(), **flow.part(train_dpo, 0.5))


def second_round(flow: Flow) -> list[dict]:
    """Ranking the tuned policy's answers too makes a better reward model, and that a better policy."""
    study, sft, first = flow.study(), flow.sft(), flow.ppo()
    rms = {"first": flow.rm(), "second": flow.rm("rm_second_round", sampler=f"{sft},{first}", answers=9)}
    runs = {"ppo": ("first", first),
            "second round, from SFT": ("second", flow.ppo("ppo_again", reward=rms["second"])),
            "second round, from PPO": ("second", flow.ppo("ppo_on", init=first, reward=rms["second"]))}
    models = {name: checkpoint.load_model(folder) for name, (_, folder) in runs.items()}
    rivals = rivals_of(study)
    rows = rows_of(study, rivals, {"sft": study.reference} | models)
    for rm, folder in rms.items():
        rows[f"best of {flow.config.best_of} by the {rm} reward model"] = row_of_best(
            dataclasses.replace(study, reward=checkpoint.load_model(folder)), rivals)
    accuracies = {rm: {f"accuracy_on_{sampler}": accuracy(rms[rm], sampler=folder, answers=5)["accuracy"]
                       for sampler, folder in (("sft", sft), ("ppo", first))} for rm in rms}
    for name, (rm, _) in runs.items():
        rows[name] |= accuracies[rm]
    return [{"row": name, **row} for name, row in rows.items()]


def diversity(flow: Flow) -> list[dict]:
    """RL lowers entropy and diversity: before and after, with and without ptx and the KL penalty."""
    study = flow.study()
    folders = {"sft": flow.sft(), "ppo": flow.ppo(), "ppo_no_ptx": flow.ppo("ppo_no_ptx", ptx=0.0),
               "ppo_no_kl": flow.ppo("ppo_no_kl", beta=0.0)}
    rows = []
    for name, folder in folders.items():
        model = study.reference if name == "sft" else checkpoint.load_model(folder)
        answers = evaluate.answers_of(study, model, 1.0)
        lines = [study.tokenizer.decode(answer) for answer in answers]
        few = study.prompts[:100]
        many = evaluate.answers_of(study, model, 1.0, [prompt for prompt in few for _ in range(8)])
        groups = [[study.tokenizer.decode(a) for a in many[i:i + 8]] for i in range(0, len(many), 8)]
        alike = [evaluate.overlap_f1(a, b) for group in groups for i, a in enumerate(group)
                 for b in group[:i]]
        entropy = evaluate.distance_of(study, model, answers, 1.0)["entropy"]
        rows.append({"row": name, "entropy": entropy, "distinct_1": evaluate.distinct(lines, 1),
                     "distinct_2": evaluate.distinct(lines, 2), "self_similarity": float(np.mean(alike))})
    return rows


def ptx(flow: Flow) -> list[dict]:
    """What mixing in the language-model loss buys: loss on the pretraining text and on human answers."""
    study, folders = flow.study(), {"base": flow.pretrain(), "sft": flow.sft(), "ppo": flow.ppo(),
                                    "ppo_no_ptx": flow.ppo("ppo_no_ptx", ptx=0.0)}
    config, run, loaded = data_of(train_pretrain, flow.pretrain())
    rows = []
    for name, folder in folders.items():
        model = checkpoint.load_model(folder)
        rows.append({"row": name, "loss": evaluate.loss_of(study, model)["loss"],
                     "bits_per_byte": train_pretrain.evaluate(config, run, loaded, model)["bits_per_byte"]})
    return rows


def over_optimisation(flow: Flow) -> list[dict]:
    """Without a KL penalty the reward goes on rising while the gold score turns down (Gao et al. 2022)."""
    study = flow.study()
    study = dataclasses.replace(study, prompts=study.prompts[:200], texts=study.texts[:200])
    steps = flow.steps(train_ppo, 2.5)["steps"]
    folder = flow.ppo("ppo_far", beta=0.0, ptx=0.0, lr=1e-3, steps=steps, save_every=max(1, steps // 40),
                      keep=99)
    rows = [{"row": "PPO, iteration 0", "kind": "ppo", **judged(study, study.reference)}]
    for step in checkpoint.steps_of(folder):                      # closer to each other where the score turns
        if step <= steps // 5 or step % (steps // 10) == 0:
            rows.append({"row": f"PPO, iteration {step}", "kind": "ppo",
                         **judged(study, checkpoint.load_model(folder, step=step))})
    most = 8 if flow.config.tiny else 64
    prompts = [prompt for prompt in study.prompts for _ in range(most)]
    samples = evaluate.answers_of(study, study.reference, 1.0, prompts)
    columns = [samples[k::most] for k in range(most)]
    reward_NP, gold_NP = (np.stack([measure(study, column) for column in columns])
                          for measure in (evaluate.rewards_of, evaluate.golds_of))
    for n in (2 ** k for k in range(most.bit_length())):
        rewards, golds = (x.reshape(most // n, n, -1) for x in (reward_NP, gold_NP))          # groups of n
        best = rewards.argmax(1, keepdims=True)
        reward, gold = (float(np.take_along_axis(x, best, 1).mean()) for x in (rewards, golds))
        rows.append({"row": f"best of {n}", "kind": "best_of_n", "kl": evaluate.kl_of_best(n),
                     "reward": reward, "gold": gold})
    return rows


def judged(study: evaluate.Study, policy, n: int = 4) -> dict[str, float]:
    """The reward model's score, the labeller's, and the KL to SFT, over n answers to each prompt."""
    answers = evaluate.answers_of(study, policy, 1.0, n * study.prompts)
    return {"kl": evaluate.distance_of(study, policy, answers, 1.0)["kl"],
            "reward": float(evaluate.rewards_of(study, answers).mean()),
            "gold": float(evaluate.golds_of(study, answers).mean())}


def gained(rows: list[dict], kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(sqrt(KL), how much `name` has risen since the first row of its seed), the seeds one after another."""
    d, gain = [], []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        of_seed = [row for row in rows if (row["kind"], row["seed"]) == (kind, seed)]
        d += [math.sqrt(max(row["kl"], 0.0)) for row in of_seed]
        gain += [row[name] - of_seed[0][name] for row in of_seed]
    return np.array(d), np.array(gain)


def fit_of_gold(d: np.ndarray, gained: np.ndarray, logarithm: bool) -> tuple[float, float]:
    """(alpha, beta) of Gao et al. 2022, section 1, by least squares: gold gained = d (alpha - beta d) for
    best-of-n, d (alpha - beta log d) for RL, with d = sqrt(KL).
    """
    second = d * np.log(d) if logarithm else d * d
    alpha, beta = np.linalg.lstsq(np.stack((d, -second), 1), gained, rcond=None)[0]
    return float(alpha), float(beta)


def draw_over_optimisation(rows: list[dict], path: Path) -> None:
    """Reward and gold score against sqrt(KL), for best-of-n and PPO, all seeds; the fits through gold."""
    from matplotlib.figure import Figure           # not pyplot: a notebook keeps its own backend
    figure = Figure(figsize=(10, 3.6))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, kind, logarithm in zip(axes, ("best_of_n", "ppo"), (False, True)):
        (d, reward), (_, gold) = (gained(rows, kind, name) for name in ("reward", "gold"))
        axis.plot(d, reward / 5, "o", color="#ee7733", markersize=5, label="reward model's score gained / 5")
        axis.plot(d, gold, "^", color="#0077bb", markersize=5, label="gold score gained")
        for seed in dict.fromkeys(row["seed"] for row in rows):       # a thin line joins the points of a seed
            for name, scale in (("reward", 5), ("gold", 1)):
                of_seed = gained([row for row in rows if row["seed"] == seed], kind, name)
                axis.plot(of_seed[0], of_seed[1] / scale, color="#999999", linewidth=0.7, zorder=0)
        alpha, beta = fit_of_gold(d[d > 0], gold[d > 0], logarithm)
        x = np.linspace(0.05, d.max(), 200)
        y = x * (alpha - beta * (np.log(x) if logarithm else x))
        law = "log d" if logarithm else "d"
        axis.plot(x, y, color="black", linewidth=1.2, label=f"d ({alpha:.3f} − {beta:.3f} {law})")
        axis.set(xlabel="d = √KL(policy ‖ SFT), KL in nats per answer",
                 title="PPO without KL penalty and ptx" if kind == "ppo" else "best of n SFT answers")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("gained since SFT")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# ---- the reward model --------------------------------------------------------------------------------------

def reward_model_accuracy(flow: Flow) -> list[dict]:
    """A better reward model makes a better policy: comparisons and their noise -> accuracy -> gold score."""
    study, rows = flow.study(), []
    rivals = rivals_of(study)
    variants = {"all": (1, 0.0), "1/4": (4, 0.0), "1/16": (16, 0.0), "1/64": (64, 0.0),
                "all, 25 % of them wrong": (1, 0.25)}
    for name, (part, noise) in variants.items():
        rm = rm_of(flow, part, noise)
        ppo = flow.ppo(f"ppo_of_{Path(rm).name}", reward=rm) if name != "all" else flow.ppo()
        row = rows_of(study, rivals, {"ppo": checkpoint.load_model(ppo)})["ppo"]
        rows.append({"row": name, **accuracies_of(rm),
                     **{k: row[k] for k in ("gold", "gold_greedy", "about_greedy", "kl")}})
    return rows


def rm_of(flow: Flow, part: int, label_noise: float) -> str:
    """A reward model of 1/part of the prompts, read as often as all are (at least a sixth of the steps)."""
    if part == 1 and not label_noise:
        return flow.rm()
    settings = flow.part(train_rm, 1 / part) | flow.steps(train_rm, max(1 / part, 1 / 6)) if part > 1 else {}
    return flow.rm(f"rm_1_of_{part}_noise_{label_noise:g}", label_noise=label_noise, **settings)


def reward_model_data(flow: Flow) -> list[dict]:
    """A reward model needs many comparisons, and agrees only as far as its labellers do."""
    variants = {f"1/{part} of the prompts": (part, 0.0) for part in (64, 16, 4)} | {"all prompts": (1, 0.0)}
    variants |= {f"1/4 of the prompts, {noise:.1%} wrong": (4, noise) for noise in (0.125, 0.25, 0.375)}
    rows = []
    for name, (part, noise) in variants.items():
        rm = rm_of(flow, part, noise)
        config = json.loads((Path(rm) / "config.json").read_text())
        rows.append({"row": name, **{key: config[key] for key in ("prompts", "label_noise", "steps")},
                     **accuracies_of(rm)})
    return rows


def accuracies_of(rm: str) -> dict[str, float]:
    return {name: value for name, value in metrics_of(rm)[-1].items() if name.startswith("accuracy")}


def reward_model_boundary(flow: Flow) -> list[dict]:
    """Where a reward model stops generalising: other packages, lengths, kinds of pairs, later samples."""
    files = corpus.corpus_files(flow.config.tiny)
    packages = sorted({module.split(".")[0] for _, module in files})
    inside = set(np.random.default_rng(flow.seed).permutation(packages)[:len(packages) // 2])
    of_package = {place: [r for r in corpus.scan(chosen) if r.response] for place, chosen in (
        ("half of the packages", [file for file in files if file[1].split(".")[0] in inside]),
        ("the other packages", [file for file in files if file[1].split(".")[0] not in inside]))}
    pairs = sum(of_package.values(), [])
    middle = np.median([len(r.response) for r in pairs])
    of_length = {"short human lines": [r for r in pairs if len(r.response) < middle],
                 "long human lines": [r for r in pairs if len(r.response) >= middle]}
    quarter = flow.part(train_rm, 1 / 4)
    rows = []
    for parts in (of_package, of_length):
        texts = {place: write_pairs(flow.folder / f"{place.replace(' ', '_')}.jsonl",
                                    [(r.prompt, r.response) for r in records])
                 for place, records in parts.items()}
        first = next(iter(texts))
        rm = flow.rm("rm_" + first.replace(" ", "_"), **quarter, data=texts[first])
        rows += [{"row": f"{first}, tested on {place}", **accuracy(rm, data=text)}
                 for place, text in texts.items()]
    rms = {"all kinds of pairs": rm_of(flow, 4, 0.0),
           "human against sample alone": flow.rm("rm_human_sample", **quarter, answers=2, mismatched=0)}
    rows += [{"row": f"{name}, tested on all kinds", **accuracy(rm, answers=5)} for name, rm in rms.items()]
    rows.append({"row": "all, tested on SFT's samples", **accuracy(flow.rm())})
    rows.append({"row": "all, tested on PPO's samples", **accuracy(flow.rm(), sampler=flow.ppo())})
    swapped = accuracy(flow.rm(), data=human_lines_swapped(flow, pairs))["accuracy"]
    return rows + [{"row": "all, tested on human lines of other functions", "accuracy": swapped}]


def human_lines_swapped(flow: Flow, pairs: list[corpus.Record]) -> str:
    """A .jsonl of comparisons: the human line about a function and one about another, held out as the first
    is or not at all, where the labeller prefers the first.
    """
    judge, rng = judge_of(flow), np.random.default_rng(flow.seed)
    compared = [(r.prompt, r.response, part[i].response)
                for part in corpus.split(pairs, checkpoint.held_out_names(flow.sft()))
                for r, i in zip(part, rng.permutation(len(part)))]
    return write_records(flow.folder / "human_lines_swapped.jsonl", [
        {"prompt": prompt, "chosen": right, "rejected": wrong} for prompt, right, wrong in compared
        if judge.gold(prompt, right) - judge.gold(prompt, wrong) >= labeller.TIE])


def accuracy(rm: str, **settings) -> dict[str, float]:
    """Accuracy of a reward model on held-out rankings of other data, or of another model's samples."""
    config, run, loaded = data_of(train_rm, rm, prompts=train_rm.Config.batch_size, **settings)
    return train_rm.evaluate(config, run, loaded, checkpoint.load_model(rm))


# ---- what goes wrong ---------------------------------------------------------------------------------------

def stability(flow: Flow) -> list[dict]:
    """Learning rate x price of the KL: where PPO fails, and what the log shows first."""
    rows = []
    for lr in (2e-4, 1e-3, 5e-3):
        for beta in (0.0, 0.05, 0.3):
            row = {"row": f"lr {lr:g}, beta {beta:g}", "lr": lr, "beta": beta}
            settings = dict(lr=lr, value_lr=lr, beta=beta, ptx=0.0, **flow.steps(train_ppo, 0.3))
            try:
                lines = metrics_of(flow.ppo(f"ppo_lr{lr:g}_beta{beta:g}", **settings), "reward")
            except Fault as fault:
                rows.append(row | {"diverged": str(fault)})
                continue
            last = {name: float(np.mean([line[name] for line in lines[-3:]]))
                    for name in ("gold", "reward", "kl", "entropy", "length", "ended", "repetition")}
            rows.append(row | last | {"gold_before": lines[0]["gold"]} | first_warning(lines))
    return rows


def first_warning(lines: list[dict]) -> dict:
    """The iteration at which the log first warns, and with which words."""
    for line in lines:
        if signs := train_ppo.warnings_of(line, lines[0]):
            return {"warned_at": line["step"], "first_warning": "; ".join(signs)}
    return {}


def hackable(flow: Flow) -> list[dict]:
    """PPO finds what a planted reward really pays for, and the log's warning line names it."""
    reward = str(Path(__file__).resolve().parent / "planted.py") + ":more_commas"
    folder = flow.ppo("ppo_commas", reward=os.path.relpath(reward), ptx=0.0, beta=0.02)
    lines = metrics_of(folder, "reward")
    shown = ("step", "reward", "gold", "kl", "entropy", "length", "ended", "repetition")
    return [{"row": name, **{key: line[key] for key in shown}, **first_warning(lines)}
            for name, line in (("before", lines[0]), ("after", lines[-1]))]


MEASUREMENTS = (rl_against_sft, relevance, second_round, diversity, ptx, over_optimisation,
                reward_model_accuracy, reward_model_data, reward_model_boundary, stability, hackable)

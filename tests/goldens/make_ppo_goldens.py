"""Write ppo.npz: what goes into and comes out of the equations of TRL 1.12.0's PPO trainer, its last release.

    pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0 accelerate datasets     alone needed here
    python tests/goldens/make_ppo_goldens.py

Nothing is computed here: TRL's own PPOTrainer.train() runs, on four tiny Llamas with random weights. Where it
calls accelerator.backward(loss), its local variables are read, and the gradients of that loss taken. The one
function that is watched besides, selective_log_softmax, gives the reference's logits, which train() deletes.
"""
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification,
                          PreTrainedTokenizerFast)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

VOCAB, PROMPT, RESPONSE, ANSWERS = 8, 3, 7, 16
PAD, END = 6, 7
OF_ROLLOUT = ("responses", "padding_mask", "padding_mask_p1", "contain_eos_token", "actual_end", "scores",
              "logprobs", "ref_logprobs", "kl", "rewards", "values", "advantages", "returns")
OF_UPDATE = ("micro_batch_inds", "logits", "new_logprobs", "vpred", "ratio", "pg_loss_max", "pg_loss",
             "vf_loss_max", "vf_loss")
UPDATES = (0, 3)                                       # the first, and the last, which the clips reach
RUNS = {"k1": dict(), "k3_whitened": dict(kl_estimator="k3", whiten_rewards=True),
        "undiscounted": dict(lam=1.0)}


def tokenizer() -> PreTrainedTokenizerFast:
    words = [str(i) for i in range(VOCAB - 2)] + ["<pad>", "<end>"]
    encoder = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    return PreTrainedTokenizerFast(tokenizer_object=encoder, pad_token="<pad>", eos_token="<end>",
                                   unk_token="<pad>", padding_side="left")


def without_padding(policy: LlamaForCausalLM) -> LlamaForCausalLM:
    """train() takes a sampled <pad> for the end of the answer, so a bias keeps it from being drawn."""
    head = torch.nn.Linear(*policy.lm_head.weight.T.shape)
    torch.nn.init.zeros_(head.bias).data[PAD] = -20
    head.weight = policy.lm_head.weight
    policy.lm_head = head
    return policy


def trained(folder: str, **changes) -> dict[str, np.ndarray]:
    """One iteration of TRL's PPO: two epochs of two minibatches."""
    torch.manual_seed(3)
    np.random.seed(3)
    sizes = LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                        num_attention_heads=2, num_labels=1, pad_token_id=PAD, eos_token_id=END,
                        initializer_range=0.35)
    prompts = torch.randint(PAD, (ANSWERS, PROMPT)).tolist()
    config = PPOConfig(output_dir=folder, per_device_train_batch_size=8, gradient_accumulation_steps=2,
                       num_mini_batches=2, num_ppo_epochs=2, total_episodes=ANSWERS, response_length=RESPONSE,
                       stop_token="eos", missing_eos_penalty=1.0, kl_coef=0.3, cliprange=0.1,
                       cliprange_value=0.2, temperature=0.7, learning_rate=0.005, report_to="none",
                       bf16=False, use_cpu=True, num_sample_generations=0, save_strategy="no", **changes)
    policy, reference = (without_padding(LlamaForCausalLM(sizes)) for _ in range(2))
    reward, value = LlamaForSequenceClassification(sizes), LlamaForSequenceClassification(sizes)
    trainer = PPOTrainer(config, tokenizer(), policy, reference, reward,
                         Dataset.from_dict({"input_ids": prompts}), value)
    record: dict[str, np.ndarray] = {}
    logits_of_calls, log_softmax = [], ppo_trainer.selective_log_softmax
    n_updates = 0

    def watched(logits, index):
        logits_of_calls.append(logits.detach().clone())
        return log_softmax(logits, index)

    def backward(loss):
        nonlocal n_updates
        local = sys._getframe(1).f_locals
        gradients = torch.autograd.grad(loss, (local["logits"], local["vpred"]), retain_graph=True)
        tensors = {name: torch.as_tensor(local[name]) for name in OF_UPDATE}
        tensors |= dict(zip(("logits_gradient", "vpred_gradient"), gradients))
        if n_updates in UPDATES:
            record.update({f"{name}_{n_updates}": x.detach().numpy() for name, x in tensors.items()})
        record.update({name: local[name].numpy() for name in OF_ROLLOUT})
        n_updates += 1
        loss.backward()

    trainer.accelerator.backward = backward
    ppo_trainer.selective_log_softmax = watched
    trainer.train()
    ppo_trainer.selective_log_softmax = log_softmax
    record["old_logits"], record["ref_logits"] = (x.numpy() for x in logits_of_calls[:2])   # of all answers
    settings = dict(kl_coef=config.kl_coef, gamma=config.gamma, lam=config.lam, cliprange=config.cliprange,
                    cliprange_value=config.cliprange_value, vf_coef=config.vf_coef,
                    missing_eos_penalty=config.missing_eos_penalty)
    return record | {name: np.array(x) for name, x in settings.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: trained(folder, **changes) for name, changes in RUNS.items()}
    arrays = {f"{run}/{name}": x for run, record in runs.items() for name, x in record.items()}
    np.savez_compressed(Path(__file__).parent / "ppo.npz", **arrays)


if __name__ == "__main__":
    main()

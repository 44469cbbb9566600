"""Sampling and beam search with the key/value cache, for all three structures and prompts of unequal length.

    python generate.py --run runs/ppo --prompt "def area(width, height):"
    python generate.py --run runs/sft --prompts functions.txt --temperature 0     one prompt a line
    python generate.py --run runs/ppo                                             asks for prompts
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import command_line
import common
import data
import hardware
import masks
from checkpoint import load_language_model, load_tokenizer, stage_of
from corpus import TEXTS, function_name, function_prompt, load_records, read_file
from errors import UserError, at_least, check_seed, read_json
from model import KVCache, LanguageModel
from tokenizer import Tokenizer


def next_tokens(logits_BV: Tensor, temperature: float, top_k: int, top_p: float,
                generator: torch.Generator | None) -> Tensor:
    """Draw one token per row. temperature 0 takes the most likely one.

    top_k keeps the k most likely tokens (Fan et al. 2018), top_p the smallest set whose probability reaches p
    (nucleus sampling, Holtzman et al. 2020); 0 and 1 keep all.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, float("-inf"))
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        p_BV = sorted_BV.softmax(-1)
        before_BV = p_BV.cumsum(-1) - p_BV                                     # probability of likelier ones
        dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(1, order_BV, before_BV >= top_p)
        logits_BV = logits_BV.masked_fill(dropped_BV, float("-inf"))
    # the inverse of the cumulative distribution: several times faster on a CPU than torch.multinomial
    cumulative_BV = logits_BV.softmax(-1).to(hardware.widest(logits_BV.device)).cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    drawn_B1 = torch.rand(total_B1.shape, generator=generator, device=total_B1.device, dtype=total_B1.dtype)
    drawn_B1 *= 1 - torch.finfo(drawn_B1.dtype).eps           # times the total it stays below it when rounded
    return torch.searchsorted(cumulative_BV, drawn_B1 * total_B1, right=True).squeeze(1)


class Decoding:
    """A batch of prompts being continued: read() takes the next tokens in and gives the logits after them."""

    def __init__(self, model: LanguageModel, prompts: list[list[int]], max_new: int, tokenizer: Tokenizer):
        self.model, self.structure, device = model, model.config.structure, model.embedding.weight.device
        begin, source_end, target_begin = tokenizer.frame(self.structure)
        sources = [[*begin, *prompt, *source_end] for prompt in prompts]
        longest = max(map(len, sources))
        n_pad = [longest - len(source) for source in sources]         # every row ends at the right
        self.tokens = torch.tensor([[tokenizer.pad] * n + row for n, row in zip(n_pad, sources)],
                                   device=device)
        self.n_pad = torch.tensor(n_pad, device=device)
        self.memory, self.cross = None, None
        opened = torch.tensor(target_begin, dtype=torch.long, device=device).repeat(len(prompts), 1)
        if self.structure == "encdec":
            self.encode()
            self.tokens, self.n_pad = opened, torch.zeros_like(self.n_pad)
        else:
            self.tokens = torch.cat((self.tokens, opened), dim=1)
        B, P = self.tokens.shape
        self.first_of_target = P - len(target_begin)               # the slots before it hold the source
        if 0 < model.config.max_positions < P + max_new - 1:
            raise UserError(f"the model has {model.config.max_positions} positions; a prompt of {P} tokens "
                            f"and an answer of {max_new} need {P + max_new - 1}")
        self.slots = torch.arange(P + max_new, device=device)
        lower = torch.is_autocast_enabled(device.type)             # the cache holds what attention reads
        dtype = torch.get_autocast_dtype(device.type) if lower else torch.float32
        self.cache = KVCache(model.config, B, P + max_new, device, dtype)

    def documents(self) -> tuple[Tensor, Tensor]:
        """(document, positions) of left-padded rows: -1 and 0 in the padding."""
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device) - self.n_pad[:, None]
        return torch.where(positions < 0, -1, 0), positions.clamp(min=0)

    def encode(self) -> None:
        """The encoder-decoder reads its prompt once; the decoder then starts from its own beginning."""
        document, positions = self.documents()
        B, S = self.tokens.shape
        if 0 < (most := self.model.config.max_positions) < S:
            raise UserError(f"the model has {most} positions, and a prompt {S} tokens")
        within = masks.same_document(document, document)
        device = self.tokens.device
        self.memory = self.model.encode(self.tokens, positions, masks.dense(within, B, S, S, device))
        self.cross = masks.dense(masks.padding(document), B, 1, S, device)

    def read_prompt(self) -> Tensor:
        """Logits (B, V) after the prompt."""
        document, positions = self.documents()
        B, T = self.tokens.shape
        part = (self.slots[:T] >= self.first_of_target).long().expand(B, T)
        # source_document only for form's sake: of an encoder-decoder's masks the cross mask is not used here
        prompt = SimpleNamespace(document=document, part=part, source_document=document)
        allowed = masks.predicates(self.structure, prompt).attention
        return self.logits(self.tokens, positions, masks.dense(allowed, B, T, T, self.tokens.device))

    def read(self, new_B: Tensor) -> Tensor:
        """Logits (B, V) after one more token per row."""
        at = self.cache.length
        allowed = (self.slots[:at + 1] >= self.n_pad[:, None])[:, None, None, :]
        return self.logits(new_B[:, None], (at - self.n_pad)[:, None], allowed)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone; one that is named several times is continued as often."""
        self.n_pad = self.n_pad[rows]
        self.cache.keep(rows)
        if self.structure == "encdec":
            self.memory, self.cross = self.memory[rows], self.cross[rows]

    def logits(self, tokens_BT: Tensor, positions: Tensor, mask) -> Tensor:
        if self.model.config.positions == "rope2d":     # the source's last place, and the place in the answer
            at, T = self.cache.length, tokens_BT.shape[1]
            in_answer = (self.slots[at:at + T] - self.first_of_target + 1).clamp(min=0).expand_as(positions)
            positions = torch.stack((positions - in_answer, in_answer))
        cross = (self.memory, self.cross) if self.structure == "encdec" else ()
        hidden_BTD = self.model.decode(tokens_BT, positions, mask, *cross, cache=self.cache)
        return self.model.logits(hidden_BTD[:, -1])


def never_drawn(vocab: int, tokenizer: Tokenizer, device: torch.device) -> Tensor:
    """The tokens that no answer holds: the special ones but the end, and those by which a published
    vocabulary was padded. To sample without them is to sample from the distribution over all others.
    """
    never = [token for token in range(vocab) if token not in tokenizer.text and token != tokenizer.end]
    return torch.tensor(never, dtype=torch.long, device=device)


def drawn_from(logits_NV: Tensor, tokenizer: Tokenizer, temperature: float) -> Tensor:
    """The logits (N, V) of the distribution that generate draws from at that temperature, all tokens kept."""
    never = never_drawn(logits_NV.shape[-1], tokenizer, logits_NV.device)
    return (logits_NV.float() / temperature).index_fill_(1, never, float("-inf"))


@torch.no_grad()
def generate(model: LanguageModel, prompts: list[list[int]], tokenizer: Tokenizer, max_new: int,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             generator: torch.Generator | None = None, batch_size: int = 256,
             specials: bool = False) -> list[list[int]]:
    """Continue every prompt until its end token, at most max_new tokens. Responses hold their end token, if
    they end, and no other special token, unless `specials` are wanted.

    Prompts of similar length share a batch, so that little is padded; one that occurs several times in it is
    read once.
    """
    responses: list = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    never = never_drawn(model.config.vocab, tokenizer, model.embedding.weight.device)
    never = never[never >= tokenizer.vocab] if specials else never
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        wanted = [tuple(prompts[i]) for i in chosen]
        place = {prompt: row for row, prompt in enumerate(dict.fromkeys(wanted))}
        decoding = Decoding(model, list(place), max_new, tokenizer)
        of_row = torch.tensor([place[prompt] for prompt in wanted], device=decoding.tokens.device)
        logits_BV = decoding.read_prompt()[of_row]
        decoding.keep(of_row)
        drawn = torch.full((len(chosen), max_new), tokenizer.end, device=logits_BV.device)
        alive = torch.arange(len(chosen), device=logits_BV.device)        # the rows that are still computed
        ended = torch.zeros_like(alive, dtype=torch.bool)
        for step in range(max_new):
            logits_BV.index_fill_(1, never, float("-inf"))
            new_B = next_tokens(logits_BV, temperature, top_k, top_p, generator)
            drawn[alive, step] = new_B
            ended |= new_B == tokenizer.end
            n_ended = int(ended.sum())                 # a GPU is waited for here alone
            if step + 1 == max_new or n_ended == len(ended):
                break
            if n_ended > 0.2 * len(ended):             # answers that have ended need not be computed any more
                going = (~ended).nonzero().squeeze(1)
                alive, new_B, ended = alive[going], new_B[going], ended[going]
                decoding.keep(going)
            logits_BV = decoding.read(new_B)
        for i, row in zip(chosen, drawn.tolist()):
            responses[i] = row[:row.index(tokenizer.end) + 1] if tokenizer.end in row else row
    return responses


@torch.no_grad()
def beam_search(model: LanguageModel, prompts: list[list[int]], tokenizer: Tokenizer, max_new: int,
                beams: int = 4, length_power: float = 1.0, batch_size: int = 64) -> list[list[int]]:
    """Look for the likeliest answer to every prompt (Sutskever et al. 2014, section 3.2), as T5 and BART do.

    `beams` hypotheses are kept; each goes on with every token, and the best of all these are kept again. One
    that has ended stays as it is, for as long as it is among the best. The score is log p / length ^
    length_power: without it the shortest wins (Wu et al. 2016, section 7, in a simpler form). Nothing is
    drawn, and one beam is greedy decoding. An answer holds no special token but its end.
    """
    batches = (prompts[i:i + batch_size] for i in range(0, len(prompts), batch_size))
    return [answer for batch in batches
            for answer in search_batch(model, batch, tokenizer, max_new, beams, length_power)]


def search_batch(model: LanguageModel, prompts: list[list[int]], tokenizer: Tokenizer, max_new: int,
                 beams: int, length_power: float) -> list[list[int]]:
    """beam_search() for prompts that fit into one batch, P of them."""
    decoding = Decoding(model, prompts, max_new, tokenizer)
    logits, P, V = decoding.read_prompt(), len(prompts), model.config.vocab
    never, row_P1 = never_drawn(V, tokenizer, logits.device), torch.arange(P, device=logits.device)[:, None]
    only_end_V = torch.full((V,), float("-inf"), device=logits.device)
    only_end_V[tokenizer.end] = 0.0                                     # what has ended goes on at no cost
    sums_PM = torch.zeros(P, 1, device=logits.device)                   # log p of the M hypotheses so far
    length_PM, ended_PM = torch.zeros_like(sums_PM), torch.zeros_like(sums_PM, dtype=torch.bool)
    tokens_PMT = torch.zeros(P, 1, 0, dtype=torch.long, device=logits.device)
    for _ in range(max_new):
        logprobs_PMV = logits.float().index_fill(1, never, float("-inf")).log_softmax(-1).view(P, -1, V)
        sums_PMV = sums_PM[..., None] + torch.where(ended_PM[..., None], only_end_V, logprobs_PMV)
        length_PM = length_PM + ~ended_PM
        scores_PMV = sums_PMV / length_PM[..., None] ** length_power
        best_PM = scores_PMV.flatten(1).topk(min(beams, scores_PMV[0].numel())).indices       # best first
        before_PM, new_PM = best_PM // V, best_PM % V
        sums_PM = sums_PMV.flatten(1).gather(1, best_PM)
        length_PM, ended_PM = length_PM.gather(1, before_PM), ended_PM.gather(1, before_PM)
        tokens_PMT = torch.cat((tokens_PMT[row_P1, before_PM], new_PM[..., None]), dim=-1)
        ended_PM = ended_PM | (new_PM == tokenizer.end)
        if ended_PM.all() or tokens_PMT.shape[-1] == max_new:
            break
        decoding.keep((row_P1 * scores_PMV.shape[1] + before_PM).flatten())
        logits = decoding.read(new_PM.flatten())
    return [row[:int(n)] for row, n in zip(tokens_PMT[:, 0].tolist(), length_PM[:, 0])]


def answers_to_show(model: LanguageModel, examples: list, tokenizer: Tokenizer, seed: int) -> list[list[int]]:
    """For samples.txt: at temperature 0.7, up to 48 tokens, or what learned positions leave room for. With
    special tokens where the examples' own targets hold some, as T5's do. GLM's blanks do not follow the end
    of a source: of them the likeliest token at every place is shown, the right ones before it being known.
    """
    if any(example.blanks for example in examples):
        return [likeliest(model, example, tokenizer) for example in examples]
    prompts = [example.source for example in examples]
    most = model.config.max_positions
    room = most + 1 - tokenizer.around - max(map(len, prompts)) if most else 48
    wanted = {token for example in examples for target in example.targets for token in target}
    generator = torch.Generator(model.embedding.weight.device).manual_seed(seed)
    return generate(model, prompts, tokenizer, max(1, min(48, room)), 0.7, generator=generator,
                    specials=not wanted <= {*tokenizer.text, tokenizer.end})


@torch.no_grad()
def likeliest(model: LanguageModel, example: data.Example, tokenizer: Tokenizer) -> list[int]:
    """The likeliest token at every place of the target, as in training."""
    structure, device = model.config.structure, model.embedding.weight.device
    batch = data.lay_out([example], structure, 1, tokenizer).to(device)
    logits_NV = model(batch, masks.of_batch(structure, batch), batch.loss_mask)
    return logits_NV[:, :tokenizer.vocab].argmax(-1).tolist()      # a published vocabulary may be padded


def generate_many(run: common.Run, model: LanguageModel, prompts: list[list[int]], tokenizer: Tokenizer,
                  max_new: int, temperature: float, seed: int) -> list[list[int]]:
    """generate() for thousands of prompts, shared between the ranks; the draws do not depend on how many."""
    parts = [prompts[i:i + 256] for i in range(0, len(prompts), 256)]
    mine = {}
    for i in run.progress(run.mine(list(range(len(parts)))), "sampling answers"):
        generator = torch.Generator(run.device).manual_seed(1_000_003 * seed + i)
        with run.autocast(sampling=True):
            mine[i] = generate(model, parts[i], tokenizer, max_new, temperature, generator=generator)
    answers = {i: part for of_rank in run.gather(mine) for i, part in of_rank.items()}
    return [answer for i in range(len(parts)) for answer in answers[i]]


# ---- command line ------------------------------------------------------------------------------------------

@dataclass
class Config:
    run: str = "runs/ppo"               # run folder of the model: runs/pretrain, runs/sft, runs/ppo
    prompt: str = ""                    # one prompt; a function signature gets its line of words
    prompts: str = ""                   # a file with one prompt a line, or a .jsonl as the stages read it
    samples: int = 1                    # answers to every prompt
    max_new: int = 64                   # tokens of an answer at most
    temperature: float = 0.5            # 0 takes the likeliest token, 1 draws as the model believes
    top_k: int = 0                      # draw from the k most likely tokens, 0: from all
    top_p: float = 1.0                  # draw from the likeliest tokens that together reach this
    beams: int = 0                      # hypotheses of a beam search, which draws nothing; 0: draw
    seed: int = 1                       # decides the draws
    device: str = "auto"                # auto, cpu, cuda, mps


def trained_context(folder: str) -> int:
    """Tokens of the longest sequence in a stage's training; 0 where the folder does not tell."""
    return read_json(Path(folder) / "config.json", absent={}).get("context", 0)


def main(config: Config) -> list[str]:
    """Answers to the prompt, to the file's prompts, or to whatever is typed. Returns them."""
    at_least(0, config, "temperature", "top_k", "beams")
    at_least(1, config, "max_new", "samples")
    check_seed(config)
    if not 0 < config.top_p <= 1:
        raise UserError(f"top_p is {config.top_p}; it must lie above 0 and up to 1")
    drawing = [name for name in ("samples", "temperature", "top_k", "top_p")
               if getattr(config, name) != getattr(Config, name)]
    if config.beams and drawing:
        raise UserError("a beam search finds one answer to a prompt and draws nothing: leave out "
                        f"{', '.join(drawing)}")
    if config.prompt and config.prompts:
        raise UserError("prompt and prompts are both given; one of them is meant")
    if config.prompts and not Path(config.prompts).is_file():
        raise UserError(f"--prompts {config.prompts}: there is no such file")
    if config.prompts and Path(config.prompts).suffix not in (".jsonl", *TEXTS):
        raise UserError(f"--prompts {config.prompts}: it must be .jsonl or text, a prompt a line")
    device = hardware.choose_device(config.device)
    tokenizer = load_tokenizer(config.run, stage_of(config.run, "pretrain"))
    model = load_language_model(config.run).to(device)
    generator, trained = torch.Generator(device).manual_seed(config.seed), trained_context(config.run)

    def answer(prompts: list[str]) -> list[str]:
        prompts = [function_prompt(prompt)                   # a bare signature gets its line of words
                   if function_name(prompt) and "\n" not in prompt.strip() else prompt
                   for prompt in prompts for _ in range(config.samples)]
        tokens = [tokenizer.encode(prompt) for prompt in prompts]
        if trained and (longest := max(map(len, tokens)) + tokenizer.around) > trained:
            print(f"note: {longest} tokens are more than {config.run} has ever read, {trained}",
                  file=sys.stderr)
        answers = (beam_search(model, tokens, tokenizer, config.max_new, config.beams) if config.beams else
                   generate(model, tokens, tokenizer, config.max_new, config.temperature, config.top_k,
                            config.top_p, generator))
        texts = [tokenizer.decode(tokens) for tokens in answers]
        for prompt, text in zip(prompts, texts):
            print(f"{prompt.rstrip()}\n{text}\n" if config.prompts else text)
        return texts

    if config.prompt:
        return answer([config.prompt])
    if config.prompts.endswith(".jsonl"):
        return answer([record.prompt or record.text for record in load_records(config.prompts)])
    if config.prompts:
        lines = [line for line in read_file(config.prompts).split("\n") if line.strip()]
        if not lines:
            raise UserError(f"--prompts {config.prompts}: it holds no prompt")
        return answer(lines)
    print("A prompt a line; an empty line or Ctrl-D ends.", file=sys.stderr)
    return [text for line in iter(lambda: sys.stdin.readline().strip(), "") for text in answer([line])]


if __name__ == "__main__":
    command_line.run(main, Config, __doc__)

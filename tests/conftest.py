"""What the test files share: a tiny tokenizer, small models with random weights, batches of every layout."""
import os
import sys
from pathlib import Path

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"             # said, not measured anew by every run of a stage
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import common                                   # noqa: E402  (the line above makes these importable)
import data                                     # noqa: E402
import model as networks                        # noqa: E402
import tokenizer as tokenizer_file              # noqa: E402

STRUCTURES = ("causal", "prefix", "encdec")
LAYOUTS = ("packed", "padded", "candidates")
TEXT = """A mask says who may attend to whom. Return the number of tokens that the mask allows.
The tokens of a packed row are told apart by their document, the candidates of a prompt by their part."""

# lengths of source and targets, row by row; a source of 0 is what next-token pretraining has
ROWS = {"packed": [[(3, [4]), (0, [5]), (2, [1])], [(4, [2]), (1, [4])]],
        "padded": [[(2, [5])], [(0, [3])], [(6, [1])]],
        "candidates": [[(3, [2, 4, 1]), (0, [3, 3])], [(2, [1, 5, 2])]]}


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Every test has its own cache folder, the same seed and one thread."""
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def no_curves(monkeypatch):
    """curves.png takes longer than the steps of a tiny model; test_stages.py sees it drawn by every stage."""
    monkeypatch.setattr(common.Log, "curves", lambda log: None)


@pytest.fixture(scope="session")
def tokenizer() -> tokenizer_file.Tokenizer:
    """A byte-level BPE of twenty merges."""
    return tokenizer_file.Tokenizer(tokenizer_file.train_bpe([TEXT], 256 + len(tokenizer_file.SPECIALS) + 20))


@pytest.fixture
def random_model(tokenizer):
    """A small fp32 model, every weight random: as built, the output projections are zero and hide bugs."""
    def make(structure: str, layers: int = 1, heads: int = 4, kv_heads: int = 2, width: int = 32, **more):
        config = networks.ModelConfig(structure, tokenizer.vocab, layers, heads, kv_heads, width, **more)
        model = networks.build(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
            else:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        torch.nn.init.normal_(model.embedding.weight)
        return model.requires_grad_(False)
    return make


def random_tokens(n: int) -> list[int]:
    """Ordinary tokens: bytes."""
    return torch.randint(256, (n,)).tolist()


def random_examples(lengths) -> list[data.Example]:
    return [data.Example(random_tokens(n), [random_tokens(k) for k in targets]) for n, targets in lengths]


@pytest.fixture
def batch_of(tokenizer, monkeypatch):
    """Several documents a row; one document a row and padding; several candidate targets of one source."""
    def make(structure: str, layout: str) -> data.Batch:
        examples = random_examples([lengths for row in ROWS[layout] for lengths in row])
        numbers = iter(range(len(examples)))
        rows = [[next(numbers) for _ in row] for row in ROWS[layout]]
        with monkeypatch.context() as patch:                 # these rows, however packing may choose
            patch.setattr(data, "balanced_rows", lambda sizes, row_length: rows)
            batch = data.lay_out(examples, structure, 0, tokenizer)
        padded = [x for x in (batch.document, batch.source_document) if x is not None and (x < 0).any()]
        assert padded and batch.one_per_row == (layout == "padded")
        return batch
    return make


def may_look(structure: str, batch: data.Batch, b: int, q: int, k: int) -> bool:
    """The table of the three structures in words: may position q of batch.tokens look at position k?"""
    if batch.document[b, q] != batch.document[b, k]:
        return False
    in_source, same_target = bool(batch.part[b, k] == 0), bool(batch.part[b, q] == batch.part[b, k])
    if structure == "causal":
        return k <= q and (in_source or same_target)
    if structure == "prefix":
        return in_source or (k <= q and same_target)
    return k <= q and same_target

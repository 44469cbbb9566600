"""Every predicate against its definition in a plain loop, and every form of a mask against every other."""
import operator
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import flex_attention

import masks
import model as networks
from conftest import LAYOUTS, STRUCTURES, may_look, random_examples
from data import lay_out

MASKS_PY = Path(masks.__file__)


def looped(allowed, B: int, T: int, S: int) -> torch.Tensor:
    """allowed(b, q, k) at every place, one at a time: (B, 1, T, S)."""
    return torch.tensor([[[[bool(allowed(b, q, k)) for k in range(S)] for q in range(T)]] for b in range(B)])


def example_predicates() -> dict:
    """name -> (B, T, S, predicate, its definition)."""
    document = torch.tensor([[0, 0, 0, 1, 1, 1, -1], [2, 2, 3, 3, 3, -1, -1], [4] * 7])
    of_key = torch.tensor([[0, 1, 1, -1, -1], [2, 2, 2, 3, 3], [4, 4, -1, -1, -1]])
    part = torch.tensor([[0, 0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2, 3]])
    return {
        "causal": (3, 7, 7, masks.causal, lambda b, q, k: k <= q),
        "bidirectional": (3, 7, 5, masks.bidirectional, lambda b, q, k: True),
        "prefix": (3, 7, 7, masks.prefix(part), lambda b, q, k: part[b, k] == 0),
        "same_part": (3, 7, 7, masks.same_part(part), lambda b, q, k: part[b, q] == part[b, k]),
        "same_document": (3, 7, 5, masks.same_document(document, of_key),
                          lambda b, q, k: document[b, q] == of_key[b, k]),
        "padding": (3, 7, 7, masks.padding(document), lambda b, q, k: document[b, k] != -1),
        "padding_query": (3, 7, 7, masks.padding_query(document), lambda b, q, k: document[b, q] == -1),
        "sliding_window": (3, 7, 7, masks.sliding_window(3), lambda b, q, k: abs(q - k) < 3)}


@pytest.mark.parametrize("name", example_predicates())
def test_dense_predicate_equals_its_definition(name):
    """The dense mask holds, at every (b, q, k), what the predicate's docstring says."""
    B, T, S, predicate, definition = example_predicates()[name]
    mask = masks.dense(predicate, B, T, S)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, looped(definition, B, T, S))


@pytest.mark.parametrize("combine", [operator.and_, operator.or_])
def test_predicates_combine_like_truth_values(combine):
    """p & q and p | q are the conjunction and the disjunction at every position, and chains of them nest."""
    square = [example for example in example_predicates().values() if example[2] == 7]
    for B, T, S, left, left_definition in square:
        for _, _, _, right, right_definition in square:
            both = combine(left, right)

            def definition(b, q, k):
                return combine(bool(left_definition(b, q, k)), bool(right_definition(b, q, k)))
            expected = looped(definition, B, T, S)
            assert torch.equal(masks.dense(both, B, T, S), expected)
            assert torch.equal(masks.dense(both & masks.sliding_window(2), B, T, S),
                               expected & looped(lambda b, q, k: abs(q - k) < 2, B, T, S))


def elements(block_mask, B: int, T: int, S: int) -> torch.Tensor:
    """A BlockMask as its kernel reads it: full blocks allow all, partial ones what mask_mod says."""
    Q, K = block_mask.BLOCK_SIZE
    mask = torch.zeros(B, 1, T, S, dtype=torch.bool)
    lists = [(block_mask.kv_num_blocks, block_mask.kv_indices, False),
             (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, True)]
    for counts, indices, full in lists:
        for b in range(B):
            for row in range(counts.shape[2]):
                for column in indices[b, 0, row, :counts[b, 0, row]].tolist():
                    for q in range(row * Q, min(T, (row + 1) * Q)):
                        k = torch.arange(column * K, min(S, (column + 1) * K))
                        zero, at = torch.tensor(0), torch.tensor(q)
                        mask[b, 0, q, k] = full or block_mask.mask_mod(torch.tensor(b), zero, at, k)
    return mask


LONG = [(60, [80]), (150, [30, 20]), (10, [115]), (3, [90]), (110, [50]), (140, [150])]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_block_mask_equals_dense(structure, tokenizer):
    """Block by block, the BlockMask allows what the dense mask allows, in sizes that 128 does not divide."""
    batch = lay_out(random_examples(LONG), structure, 200, tokenizer)
    assert len(batch.tokens) > 1 and batch.tokens.shape[1] > 128 and batch.tokens.shape[1] % 128
    (B, T), kinds = batch.tokens.shape, masks.predicates(structure, batch)
    S = T if batch.source is None else batch.source.shape[1]
    for predicate, n, m in ((kinds.attention, T, T), (kinds.encoder, S, S), (kinds.cross, T, S)):
        if predicate is not None:
            blocks = masks.block_mask(predicate, B, n, m)
            assert torch.equal(elements(blocks, B, n, m), masks.dense(predicate, B, n, m))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("T, S", [(128, 128), (256, 128), (70, 150)])
def test_flex_attention_equals_written_out(T, S):
    """FlexAttention under a predicate's BlockMask computes the text's formula, T = S or not."""
    of_query, of_key = (torch.sort(torch.randint(0, 3, (2, n)), dim=1).values for n in (T, S))
    of_key[:, :3] = torch.arange(3)                      # every query finds its document
    documents = masks.same_document(of_query, of_key)
    q, k, v = torch.randn(2, 4, T, 8), torch.randn(2, 2, S, 8), torch.randn(2, 2, S, 8)
    for predicate in (documents, documents | masks.causal, masks.bidirectional):
        by_hand = networks.written_out_attention(q, *(x.repeat_interleave(2, dim=1) for x in (k, v)),
                                                 masks.dense(predicate, 2, T, S))
        fused = networks.flex(q, k, v, masks.block_mask(predicate, 2, T, S))
        torch.testing.assert_close(fused, by_hand, atol=2e-6, rtol=0)


def test_one_fused_kernel_serves_batches_of_all_sizes(tokenizer, monkeypatch):
    """Sizes, documents and prefixes are arguments of the compiled kernel: batches of other sizes compile none."""
    compiled = []

    def keep(graph, inputs):
        compiled.append(graph)
        return graph
    fused = torch.compile(flex_attention.flex_attention, dynamic=True, backend=keep)
    monkeypatch.setattr(flex_attention, "flex_attention", fused)
    for n in range(12):
        lengths = [(20 + 37 * n % 90, [30 + 53 * n % 150]) for _ in range(2 + n % 5)]
        batch = lay_out(random_examples(lengths), "prefix", 250, tokenizer)
        (B, T), predicate = batch.tokens.shape, masks.predicates("prefix", batch).attention
        q, k, v = torch.randn(B, 4, T, 16), torch.randn(B, 2, T, 16), torch.randn(B, 2, T, 16)
        networks.flex(q, k, v, masks.block_mask(predicate, B, T, T))
        if n == 6:                            # by now one row and several, one block and several have been seen
            first = len(compiled)
    assert len(compiled) == first <= 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_masks_of_a_batch_equal_the_table(structure, layout, batch_of):
    """At real queries, the masks of a batch say what the table of the three structures says."""
    batch = batch_of(structure, layout)
    (B, T), made = batch.tokens.shape, masks.of_batch(structure, batch)
    real = (batch.document >= 0)[:, None, :, None]
    attention = masks.dense(masks.causal, B, T, T) if made.attention is masks.causal else made.attention
    table = looped(lambda b, q, k: may_look(structure, batch, b, q, k), B, T, T)
    assert torch.equal(attention & real, table & real)
    if structure == "encdec":
        source, S = batch.source_document, batch.source.shape[1]
        real_source = (source >= 0)[:, None, :, None]
        encoder = looped(lambda b, q, k: source[b, q] == source[b, k], B, S, S)
        cross = looped(lambda b, q, k: batch.document[b, q] == source[b, k], B, T, S)
        assert torch.equal(made.encoder & real_source, encoder & real_source)
        assert torch.equal(made.cross & real, cross & real)
    else:
        assert made.encoder is None and made.cross is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_query_attends_to_nothing(structure, layout, batch_of):
    """Every row of every mask allows something, in the padding too: a softmax over nothing would be NaN."""
    batch = batch_of(structure, layout)
    for mask in masks.of_batch(structure, batch):
        if mask is not None and mask is not masks.causal:
            assert mask.any(-1).all()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_only_plain_causal_rows_go_without_a_tensor(structure, batch_of):
    """The predicate itself stands for the mask where padding lies behind every query, and nowhere else."""
    for layout in LAYOUTS:
        made = masks.of_batch(structure, batch_of(structure, layout))
        assert (made.attention is masks.causal) == (structure == "causal" and layout == "padded")


def test_unknown_structure_is_refused(batch_of):
    """The error names what was given and what is possible."""
    with pytest.raises(ValueError, match="'decoder'.*causal, prefix or encdec"):
        masks.predicates("decoder", batch_of("causal", "packed"))


@pytest.mark.parametrize("n_source, n_target", [(4, 4), (1, 5), (3, 2)])
def test_picture_in_letters_shows_the_textbook_masks(n_source, n_target):
    """Every cell of the ASCII picture, read back, is the textbook mask; # is a source key, + a target key."""
    n, figure = n_source + n_target, masks.textbook(n_source, n_target)
    rows = [line.split() for line in masks.ascii_picture(n_source, n_target).splitlines()[2:2 + n]]
    for i, mask in enumerate(figure.values()):
        for q, row in enumerate(rows):
            name, *cells = row[i * (n + 1):(i + 1) * (n + 1)]
            assert name == (f"s{q + 1}" if q < n_source else f"t{q - n_source + 1}")
            assert cells == [("#" if k < n_source else "+") if mask[q, k] else "." for k in range(n)]


def test_textbook_masks_are_those_of_a_batch(tokenizer):
    """The decoders' textbook figures are the masks of one pair (its <bos> counts as source)."""
    for structure, name in (("causal", "causal decoder"), ("prefix", "prefix decoder")):
        batch = lay_out(random_examples([(3, [4])]), structure, 1, tokenizer)
        mask = masks.dense(masks.predicates(structure, batch).attention, 1, 8, 8)[0, 0]
        assert torch.equal(mask, masks.textbook(4, 4)[name])


def test_command_line_draws_a_picture(tmp_path):
    """python masks.py --picture FILE prints the ASCII figure and writes an image."""
    path = tmp_path / "masks.png"
    done = subprocess.run([sys.executable, MASKS_PY, "--picture", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert masks.ascii_picture() in done.stdout
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [["--picture"], ["--pictures", "masks.png"], ["masks.png"]])
def test_command_line_refuses_wrong_arguments(arguments, monkeypatch, tmp_path, capsys):
    """Anything else ends with a sentence and exit code 2, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["masks.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(MASKS_PY), run_name="__main__")
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and stop.value.code == 2
    assert list(tmp_path.iterdir()) == []

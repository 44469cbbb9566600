"""Who may attend to whom: the one thing that separates the three structures.

A mask is a predicate `allowed(b, h, q, k)`: may query position q of row b (head h) look at key position k?
True means allowed, here and in every file; a loss mask is likewise True where the loss counts. Predicates
combine with `&` and `|` and have FlexAttention's signature, so the same predicate becomes a dense boolean
tensor for written-out attention, a BlockMask for the fused CUDA kernel, or a picture:

    python masks.py                     the three structures side by side, in ASCII
    python masks.py --picture masks.png

A row of a batch may hold several documents (packing), and a document one source and several targets that do
not see each other (the candidates of one prompt). Three integers per token say all of it (data.Batch):
`document` (-1: padding), `part` (0: source, k: the k-th target) and its index in the row.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor


class Predicate:
    """A function allowed(b, h, q, k) -> bool that can be combined with & and |."""

    def __init__(self, allowed: Callable):
        self.allowed = allowed

    def __call__(self, b, h, q, k):
        return self.allowed(b, h, q, k)

    def __and__(self, other: "Predicate") -> "Predicate":
        left, right = self.allowed, other.allowed       # plain functions: what FlexAttention can trace
        return Predicate(lambda b, h, q, k: left(b, h, q, k) & right(b, h, q, k))

    def __or__(self, other: "Predicate") -> "Predicate":
        left, right = self.allowed, other.allowed
        return Predicate(lambda b, h, q, k: left(b, h, q, k) | right(b, h, q, k))


# ---- the predicates ----------------------------------------------------------------------------------------

causal = Predicate(lambda b, h, q, k: q >= k)
bidirectional = Predicate(lambda b, h, q, k: (q >= 0) & (k >= 0))     # everything, as a tensor


def prefix(part: Tensor) -> Predicate:
    """The key lies in the source. part (B, S): 0 in the source, k >= 1 in the k-th target."""
    return Predicate(lambda b, h, q, k: part[b, k] == 0)


def same_part(part: Tensor) -> Predicate:
    """Key and query lie in the same target: candidates of one prompt do not see each other. part (B, S)."""
    return Predicate(lambda b, h, q, k: part[b, q] == part[b, k])


def same_document(of_query: Tensor, of_key: Tensor) -> Predicate:
    """Key and query belong to the same document of a packed row. of_query (B, T), of_key (B, S)."""
    return Predicate(lambda b, h, q, k: of_query[b, q] == of_key[b, k])


def padding(document: Tensor) -> Predicate:
    """The key is a real token. document (B, S): -1 marks padding."""
    return Predicate(lambda b, h, q, k: document[b, k] >= 0)


def padding_query(document: Tensor) -> Predicate:
    """The query is padding. Its output is thrown away, but a row that attends to nothing would be NaN."""
    return Predicate(lambda b, h, q, k: document[b, q] < 0)


def sliding_window(width: int) -> Predicate:
    """The key lies less than `width` positions away from the query."""
    return Predicate(lambda b, h, q, k: (q - k < width) & (k - q < width))


# ---- from predicate to tensor ------------------------------------------------------------------------------

def dense(predicate: Predicate, B: int, T: int, S: int, device="cpu") -> Tensor:
    """The predicate at every (b, q, k): bool (B, 1, T, S), the same for all heads."""
    b = torch.arange(B, device=device).view(B, 1, 1, 1)
    q = torch.arange(T, device=device).view(1, 1, T, 1)
    k = torch.arange(S, device=device).view(1, 1, 1, S)
    return predicate(b, torch.zeros_like(b), q, k).expand(B, 1, T, S)


def block_mask(predicate: Predicate, B: int, T: int, S: int, device="cpu"):
    """The predicate as FlexAttention's BlockMask: blocks of 128 x 128 that are empty are never computed."""
    from torch.nn.attention.flex_attention import create_block_mask
    return create_block_mask(predicate.allowed, B, None, T, S, device=device)


def realise(predicate: Predicate, B: int, T: int, S: int, device) -> Any:
    """The form in which model.attention takes a mask on this device, built once per batch for all layers.

    CUDA: a BlockMask for the fused kernel. Elsewhere a dense tensor, since FlexAttention has no backward
    there.
    """
    build = block_mask if torch.device(device).type == "cuda" else dense
    return build(predicate, B, T, S, device)


# ---- the masks of a batch ----------------------------------------------------------------------------------

class Masks(NamedTuple):
    """What the model needs for one batch. encoder and cross belong to the encoder-decoder alone."""
    attention: Any                # self-attention over batch.tokens
    encoder: Any = None           # self-attention over batch.source
    cross: Any = None             # from batch.tokens to batch.source


def predicates(structure: str, batch) -> Masks:
    """The predicates of a structure for one batch (data.Batch); causal, prefix or encdec."""
    within = same_document(batch.document, batch.document)
    if structure == "causal":
        return Masks(causal & within & (prefix(batch.part) | same_part(batch.part)))
    if structure == "prefix":
        return Masks(within & (prefix(batch.part) | (causal & same_part(batch.part))))
    if structure == "encdec":
        source = batch.source_document
        return Masks(attention=causal & within & same_part(batch.part),
                     encoder=same_document(source, source),
                     cross=same_document(batch.document, source) | padding_query(batch.document))
    raise ValueError(f"structure is {structure!r}; it must be causal, prefix or encdec")


def of_batch(structure: str, batch) -> Masks:
    """The masks of a batch in the form model.attention takes them.

    Rows of one source and one target each, padded on the right, need no tensor under the causal mask: the
    padding lies after every real query. Then the predicate `causal` itself is returned, and attention takes
    the fastest route.
    """
    if structure == "causal" and batch.one_per_row:
        return Masks(causal)
    allowed, device = predicates(structure, batch), batch.tokens.device
    B, T = batch.tokens.shape
    if structure != "encdec":
        return Masks(realise(allowed.attention, B, T, T, device))
    S = batch.source.shape[1]
    return Masks(realise(allowed.attention, B, T, T, device), realise(allowed.encoder, B, S, S, device),
                 realise(allowed.cross, B, T, S, device))


# ---- the picture -------------------------------------------------------------------------------------------

def textbook(n_source: int = 4, n_target: int = 4) -> dict[str, Tensor]:
    """The three masks of the textbook figure for one pair: name -> bool (positions, positions).

    The encoder-decoder is drawn as one square too: source rows are the encoder, target rows the decoder's
    cross-attention (left) and self-attention (right).
    """
    n = n_source + n_target
    part = (torch.arange(n) >= n_source).long()[None]
    figure = {"causal decoder": causal, "prefix decoder": causal | prefix(part),
              "encoder-decoder": causal | prefix(part)}
    return {name: dense(predicate, 1, n, n)[0, 0] for name, predicate in figure.items()}


def ascii_picture(n_source: int = 4, n_target: int = 4) -> str:
    """The three masks side by side: # allowed in the source, + allowed in the target, . forbidden."""
    names = [f"s{i + 1}" for i in range(n_source)] + [f"t{i + 1}" for i in range(n_target)]
    figure = textbook(n_source, n_target)
    width = 3 * len(names) + 6
    lines = ["".join(f"{name:<{width}}" for name in figure),
             "".join(f"{'   ' + ''.join(f'{name:>3}' for name in names):<{width}}" for _ in figure)]
    for q, name in enumerate(names):
        cells = ["".join(f"{'.' if not allowed else '#' if k < n_source else '+':>3}"
                         for k, allowed in enumerate(mask[q])) for mask in figure.values()]
        lines.append("".join(f"{f'{name:>3}' + cell:<{width}}" for cell in cells))
    lines += ["rows: queries, columns: keys, s: source, t: target.  # sees source   + sees target   . masked",
              "The encoder-decoder has the prefix decoder's mask. What differs: source and target have a",
              "stack of layers each, and the target reads the source (bottom left) by cross-attention,",
              "from the encoder's last layer."]
    return "\n".join(line.rstrip() for line in lines)


def write_picture(path: str) -> None:
    """Draw the textbook figure into a file (png, pdf, svg)."""
    from matplotlib.figure import Figure           # not pyplot: a notebook keeps its own backend
    figure = Figure(figsize=(10, 3.6))
    axes = figure.subplots(1, 3)
    for axis, (name, mask) in zip(axes, textbook().items()):
        in_source = torch.arange(mask.shape[1])[None] < 4
        axis.imshow(mask.float() * (1 + (~in_source).float()), cmap="Blues", vmin=0, vmax=2.6)
        axis.set(title=name, xlabel="key")
        for set_ticks in (axis.set_xticks, axis.set_yticks):
            set_ticks(range(8), [f"{part}{i}" for part in "st" for i in range(1, 5)])
            set_ticks([x - 0.5 for x in range(1, 8)], minor=True)
        axis.grid(which="minor", color="white")
        axis.tick_params(which="both", length=0)
    axes[0].set_ylabel("query")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


@dataclass
class Config:
    picture: str = ""                   # draw the figure into this file too (png, pdf or svg)


def main(config: Config) -> None:
    from errors import UserError                   # only a program needs it
    if config.picture:
        picture = Path(config.picture)
        if not picture.absolute().parent.is_dir():
            raise UserError(f"picture {picture}: there is no such folder")
        if picture.is_dir():
            raise UserError(f"picture {picture}: it is a folder")
        if picture.suffix not in (".png", ".pdf", ".svg"):
            raise UserError(f"picture {picture}: the name must end in .png, .pdf or .svg")
        write_picture(config.picture)
    print(ascii_picture())


if __name__ == "__main__":
    import command_line
    command_line.run(main, Config, __doc__)

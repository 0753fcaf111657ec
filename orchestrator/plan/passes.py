"""What one forward and backward pass allocates: the model's own code, run on the meta device."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from orchestrator.errors import UnplannableError, first_line
from orchestrator.lengths import row_lengths
from orchestrator.plan.heap import heap_bytes
from orchestrator.plan.shapes import Shape, build

# How layers are recomputed, planned and in training. Only the adapters' dropout draws numbers in
# them, from generators of its own.
CHECKPOINTING = {"use_reentrant": False, "preserve_rng_state": False}
# Layers by which two runs differ, on CUDA or not. A CPU's heap takes some layers to settle; from
# there on its holes grow evenly.
_LAYERS_APART = {True: 1, False: 8}
# What oneDNN keeps of each product that is counted: its operands come in other orders as well, and
# with segments of other lengths, some 1.8 shapes in all. Each takes 540 KiB of the heap, and more
# with its inputs, as machine code does, up to the widest of the models that were measured. On AMX
# it was 21 MiB a length of rows with 576 and 1536 inputs, 31 MiB with 2048 and 8192.
_COMPILED, _COMPILED_OF_INPUT, _MOST_INPUTS = 2**20, 480, 8192


@dataclass(frozen=True)
class Pass:
    """A pass to be planned.

    lengths: tokens of the row's segments. targets: names of the layers with an adapter.
    varlen: whether the GPU has torch's variable-length attention. products: dtype of the matrix
    products. longest_row: tokens that a row of evaluation may have, where there is any. standing:
    bytes of each block of the optimizer's state, which a CPU's heap holds too.
    """

    lengths: tuple[int, ...]
    checkpointing: bool
    rank: int
    tenants: int
    dropout: float
    targets: frozenset[str]
    quantized: bool
    double_quant: bool
    dtype: str
    cuda: bool
    varlen: bool
    products: str
    longest_row: int = 0
    standing: tuple[int, ...] = ()


@dataclass(frozen=True)
class PassBytes:
    """Bytes beyond what lies there between steps.

    peak: the most that is held at a time. kept: what the forward pass leaves for the backward.
    logits: what the loss holds beside `kept` at its own peak. in_loss: whether the pass's peak
    is that of the loss. holes: what the heap takes on a CPU beyond `peak`, and what is compiled.
    """

    peak: int
    kept: int
    logits: int
    in_loss: bool
    holes: int


def pass_bytes(shape: Shape, planned: Pass) -> PassBytes:
    """Bytes of a pass.

    Layers of one kind hold equally much, so a deep model is run at two small depths only and the
    rest follows in a straight line.

    Raises:
        UnplannableError: the model's own code does not run on the meta device.
    """
    try:
        return _pass_bytes(shape, planned)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        name = type(shape.config).__name__
        raise UnplannableError(
            f"model.base: a pass of {name} cannot be planned: {first_line(error)}"
        ) from error


def _pass_bytes(shape: Shape, planned: Pass) -> PassBytes:
    layers = shape.layers
    period, first = _period(shape)
    apart = -(-_LAYERS_APART[planned.cuda] // period) * period
    shallow = first + apart + (layers - first) % period
    deep = shallow + apart
    if deep >= layers:
        return _run(shape, planned, layers)
    a, b = _run(shape, planned, shallow), _run(shape, planned, deep)
    steps = (layers - deep) / apart
    return PassBytes(
        round(b.peak + steps * (b.peak - a.peak)),
        round(b.kept + steps * (b.kept - a.kept)),
        b.logits,
        b.in_loss,
        max(b.holes, round(b.holes + steps * (b.holes - a.holes))),
    )


def _period(shape: Shape) -> tuple[int, int]:
    """(length of the pattern in which kinds of layers repeat, layers before it begins)."""
    kinds = getattr(shape.config, "layer_types", None) or ["layer"] * shape.layers
    dense_first = getattr(shape.config, "first_k_dense_replace", None) or 0
    for period in range(1, shape.layers):
        if all(a == b for a, b in zip(kinds, kinds[period:], strict=False)):
            return period, dense_first
    return shape.layers, 0


@lru_cache(maxsize=256)
def _run(shape: Shape, planned: Pass, depth: int) -> PassBytes:
    import torch

    from orchestrator.plan.ledger import Ledger
    from orchestrator.plan.standins import planned_loss

    model = _prepared(shape, planned, depth)
    text = model.config.get_text_config()
    tokens = sum(planned.lengths)
    known = (*model.parameters(), *model.buffers(), *_of_standins(model))
    with Ledger(known, 512 if planned.cuda else 64) as ledger:
        ids = torch.empty(1, tokens, dtype=torch.long, device="meta")
        output: Any = model.base_model(
            input_ids=ids,
            position_ids=ids,
            use_cache=False,
            segment_lengths=planned.lengths,
            planned_for_cuda=planned.cuda,
            planned_varlen=planned.varlen,
        )
        hidden = output.last_hidden_state[0]
        picked = hidden.index_select(0, ids[0])
        kept = ledger.live
        with ledger.note("loss"):
            head = model.get_output_embeddings().weight
            softcap = getattr(text, "final_logit_softcapping", None)
            loss = planned_loss(
                picked, head, softcap, _logit_scale(text), _products(planned), planned.cuda
            )
        at_loss, forward = ledger.peak, set(ledger.products)
        loss.backward()
    in_loss = ledger.peak_note == "loss"
    holes = 0
    if not planned.cuda:
        holes = heap_bytes(ledger.events, planned.standing) - ledger.peak
        # Only bfloat16 products go through oneDNN here; float32's have no code of their own.
        if planned.products == "bfloat16":
            trained = len(row_lengths(tokens))
            evaluated = len(row_lengths(max(tokens, planned.longest_row))) - trained
            passing = {tokens} - {n for la in shape.linears for n in (la.inputs, la.outputs)}
            holes += trained * _compiled(ledger.products, passing)
            holes += evaluated * _compiled(forward, passing)
    return PassBytes(ledger.peak, kept, max(0, at_loss - kept), in_loss, holes)


def _compiled(products: Iterable[tuple[Any, tuple[Any, ...]]], passing: set[int]) -> int:
    """Bytes that oneDNN keeps of products, for one length of rows.

    Args:
        products: as the ledger has them.
        passing: inputs that are tokens of the longest row; others' rows have fewer.
    """
    inputs = (operands[-1][0][-2] for _, operands in products)
    widths = (0 if count in passing else min(count, _MOST_INPUTS) for count in inputs)
    return sum(_COMPILED + _COMPILED_OF_INPUT * width for width in widths)


def _products(planned: Pass) -> Any:
    import torch

    return getattr(torch, planned.products)


def _logit_scale(config: Any) -> float:
    scaled = getattr(config, "logits_scaling", None) or getattr(config, "logit_scale", None)
    return 2.0 if scaled and scaled != 1.0 else 1.0


def _of_standins(model: Any) -> Iterator[Any]:
    """Tensors that stay with the stand-ins: no parameters, yet no part of the pass."""
    from orchestrator.plan.standins import PlannedLinear

    for module in model.modules():
        if isinstance(module, PlannedLinear):
            yield module.anchor
            if module.dense is not None:
                yield module.dense


def _cut(config: Any, layers: int, depth: int) -> Any:
    """A config of the first `depth` layers."""
    cut = deepcopy(config)
    cut.num_hidden_layers = depth
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(cut, name, value[:depth])
    return cut


def _prepared(shape: Shape, planned: Pass, depth: int) -> Any:
    """The model with `depth` layers and our stand-ins in it."""
    from torch import nn

    from orchestrator.plan.fused import fuse
    from orchestrator.plan.standins import PlannedLinear, Setting

    config = _cut(shape.config, shape.layers, depth)
    model = build(config, planned.dtype, shape.trust_remote_code)
    setting = Setting(
        planned.rank,
        planned.tenants,
        planned.dropout,
        planned.double_quant,
        planned.cuda,
        _products(planned),
    )
    for layer in shape.linears:
        parent, _, leaf = layer.name.rpartition(".")
        try:
            holder = model.get_submodule(parent)
            module = getattr(holder, leaf)
        except AttributeError:
            continue  # of a layer that was cut off
        adapted, quantized = layer.name in planned.targets, planned.quantized and layer.quantized
        # On a CPU layers without an adapter too may be part of a fused module.
        if adapted or quantized or not planned.cuda:
            setattr(holder, leaf, PlannedLinear(module, quantized, adapted, setting))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if not planned.cuda:
        fuse(model)
    if planned.checkpointing:
        model.activation_checkpointing_enable(CHECKPOINTING)
    return model

"""Names become fields: every weight of the trunk is read, checked and bound once, and never looked up again.

The official names are spelled here and nowhere else above `dsv4_quant`. Matrices stay packed, as views of the mapped
file, unless the whole model is small enough to be expanded to float32; vectors and small tensors are always tensors.
Stages for drafting (`mtp.*`) are left in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from dsv4_kernels.compressor import OVERLAPPING, Pending
from dsv4_kernels.hyper import Mixer
from dsv4_kernels.linear import Weight
from dsv4_kernels.moe import Expert, Experts
from dsv4_quant.errors import CorruptFile
from dsv4_quant.files import Source
from dsv4_quant.formats import Packed

Node = TypeVar("Node")


@dataclass(frozen=True)
class CompressorWeights:
    wkv: Weight    # [c * d, hidden], c = 2 with overlap
    wgate: Weight  # [c * d, hidden]
    ape: Tensor    # [ratio, c * d]
    norm: Tensor   # [d]


@dataclass(frozen=True)
class IndexerWeights:
    wq_b: Weight          # [index heads * index dim, q rank]
    weights_proj: Weight  # [index heads, hidden]
    compressor: CompressorWeights


@dataclass(frozen=True)
class AttentionWeights:
    wq_a: Weight     # [q rank, hidden]
    q_norm: Tensor   # [q rank]
    wq_b: Weight     # [heads * head dim, q rank]
    wkv: Weight      # [head dim, hidden]
    kv_norm: Tensor  # [head dim]
    wo_a: Weight     # [groups * o rank, heads * head dim / groups]
    wo_b: Weight     # [hidden, groups * o rank]
    sink: Tensor     # [heads]
    compressor: CompressorWeights | None
    indexer: IndexerWeights | None


@dataclass(frozen=True)
class MoeWeights:
    gate: Weight          # [experts, hidden]
    bias: Tensor | None   # [experts], where the router is learned
    table: Tensor | None  # int64 [vocab, experts per token], where the token id decides
    experts: Experts
    shared: Expert


@dataclass(frozen=True)
class LayerWeights:
    attn_norm: Tensor  # [hidden]
    ffn_norm: Tensor   # [hidden]
    hc_attn: Mixer
    hc_ffn: Mixer
    attention: AttentionWeights
    moe: MoeWeights


@dataclass(frozen=True)
class ModelWeights:
    embed: Weight  # [vocab, hidden]
    head: Weight   # [vocab, hidden]
    norm: Tensor   # [hidden]
    hc_head: Mixer
    layers: list[LayerWeights]

    @property
    def nbytes(self) -> int:
        """Bytes as held: packed weights count as stored."""
        return sum(leaf.nbytes for leaf in leaves(self))

    @property
    def values(self) -> int:
        """How many numbers these weights hold."""
        return sum(torch.Size(leaf.shape).numel() for leaf in leaves(self))


def bind(source: Source, expand_limit: int, *, exact: bool = False, device: str = "cpu",
         devices: Sequence[str] = ()) -> ModelWeights:
    """The trunk's weights; expanded to float32 when that takes at most `expand_limit` bytes.

    On another device than the CPU they are copies, made one by one from the mapped file, so that the host's memory holds
    pages of the file at most. devices: of each layer, where that is to decide; the embedding lies with the first and the head
    with the last, and routed experts that are not expanded stay in the file. With `exact` nobody may round what packed weights
    are multiplied with. Raises CorruptFile for a tensor that is missing or whose shape is not the configuration's.
    """
    weights = Binder(source, exact).model()
    expanded = 4 * weights.values <= expand_limit
    if expanded:
        weights = _mapped(weights, lambda leaf: leaf.float() if isinstance(leaf, Packed) else leaf)
    left = (Experts,) if devices and not expanded else ()

    def moved(part: Node, where: str) -> Node:
        return part if where == "cpu" else _mapped(part, lambda leaf: leaf.to(where), left)

    devices = devices or [device] * len(weights.layers)
    return ModelWeights(moved(weights.embed, devices[0]), moved(weights.head, devices[-1]), moved(weights.norm, devices[-1]),
                        moved(weights.hc_head, devices[-1]), list(map(moved, weights.layers, devices)))


class Binder:
    """Walks the model from the top; each method binds one part of it and states the shapes it must have."""

    def __init__(self, source: Source, exact: bool) -> None:
        self.source = source
        self.exact = exact
        self.config = source.config

    def model(self) -> ModelWeights:
        c = self.config
        return ModelWeights(
            embed=self.matrix("embed.weight", c.vocab_size, c.hidden_size),
            head=self.matrix("head.weight", c.vocab_size, c.hidden_size),
            norm=self.tensor("norm.weight", c.hidden_size),
            hc_head=self.mixer("hc_head", c.hc_mult, 1),
            layers=[self.layer(layer) for layer in range(c.num_hidden_layers)])

    def layer(self, layer: int) -> LayerWeights:
        c, prefix = self.config, f"layers.{layer}."
        mixes = (2 + c.hc_mult) * c.hc_mult
        return LayerWeights(
            attn_norm=self.tensor(prefix + "attn_norm.weight", c.hidden_size),
            ffn_norm=self.tensor(prefix + "ffn_norm.weight", c.hidden_size),
            hc_attn=self.mixer(prefix + "hc_attn", mixes, 3),
            hc_ffn=self.mixer(prefix + "hc_ffn", mixes, 3),
            attention=self.attention(prefix + "attn.", c.ratio(layer)),
            moe=self.moe(prefix + "ffn.", by_hash=c.is_hash(layer)))

    def attention(self, prefix: str, ratio: int) -> AttentionWeights:
        c = self.config
        heads = c.num_attention_heads * c.head_dim
        return AttentionWeights(
            wq_a=self.matrix(prefix + "wq_a.weight", c.q_lora_rank, c.hidden_size),
            q_norm=self.tensor(prefix + "q_norm.weight", c.q_lora_rank),
            wq_b=self.matrix(prefix + "wq_b.weight", heads, c.q_lora_rank),
            wkv=self.matrix(prefix + "wkv.weight", c.head_dim, c.hidden_size),
            kv_norm=self.tensor(prefix + "kv_norm.weight", c.head_dim),
            wo_a=self.matrix(prefix + "wo_a.weight", c.o_groups * c.o_lora_rank, heads // c.o_groups),
            wo_b=self.matrix(prefix + "wo_b.weight", c.hidden_size, c.o_groups * c.o_lora_rank),
            sink=self.tensor(prefix + "attn_sink", c.num_attention_heads),
            compressor=self.compressor(prefix + "compressor.", ratio, c.head_dim) if ratio else None,
            indexer=self.indexer(prefix + "indexer.", ratio) if ratio == OVERLAPPING else None)

    def compressor(self, prefix: str, ratio: int, width: int) -> CompressorWeights:
        _, channels = Pending.shape(ratio, width)
        return CompressorWeights(
            wkv=self.matrix(prefix + "wkv.weight", channels, self.config.hidden_size),
            wgate=self.matrix(prefix + "wgate.weight", channels, self.config.hidden_size),
            ape=self.tensor(prefix + "ape", ratio, channels),
            norm=self.tensor(prefix + "norm.weight", width))

    def indexer(self, prefix: str, ratio: int) -> IndexerWeights:
        c = self.config
        return IndexerWeights(
            wq_b=self.matrix(prefix + "wq_b.weight", c.index_n_heads * c.index_head_dim, c.q_lora_rank),
            weights_proj=self.matrix(prefix + "weights_proj.weight", c.index_n_heads, c.hidden_size),
            compressor=self.compressor(prefix + "compressor.", ratio, c.index_head_dim))

    def moe(self, prefix: str, by_hash: bool) -> MoeWeights:
        c = self.config
        width = c.moe_intermediate_size
        return MoeWeights(
            gate=self.matrix(prefix + "gate.weight", c.n_routed_experts, c.hidden_size),
            bias=None if by_hash else self.tensor(prefix + "gate.bias", c.n_routed_experts),
            table=self.table(prefix + "gate.tid2eid", c.vocab_size, c.num_experts_per_tok) if by_hash else None,
            experts=Experts(self.expert(f"{prefix}experts.{number}.", width) for number in range(c.n_routed_experts)),
            shared=self.expert(prefix + "shared_experts.", c.n_shared_experts * width))

    def expert(self, prefix: str, width: int) -> Expert:
        hidden = self.config.hidden_size
        return Expert(w1=self.matrix(prefix + "w1.weight", width, hidden),
                      w3=self.matrix(prefix + "w3.weight", width, hidden),
                      w2=self.matrix(prefix + "w2.weight", hidden, width))

    def mixer(self, prefix: str, mixes: int, scales: int) -> Mixer:
        c = self.config
        return Mixer(fn=self.tensor(prefix + "_fn", mixes, c.hc_mult * c.hidden_size),
                     base=self.tensor(prefix + "_base", mixes),
                     scale=self.tensor(prefix + "_scale", scales))

    def matrix(self, name: str, *shape: int) -> Packed:
        """A weight as stored."""
        packed = self.source.read(name)
        if tuple(packed.shape) != shape:
            raise CorruptFile(
                f"{name} in {self.source.path} has shape {list(packed.shape)}, "
                f"but its configuration implies {list(shape)}.",
                "The file does not belong to its configuration, or is damaged; get it again.")
        return replace(packed, exact=True) if self.exact else packed

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A small float tensor, float32."""
        return self.matrix(name, *shape).float()

    def table(self, name: str, *shape: int) -> Tensor:
        """Numbers of experts, int64, whatever the width they are stored in."""
        numbers, experts = self.matrix(name, *shape).data.to(torch.int64).reshape(shape), self.config.n_routed_experts
        least, most = int(numbers.min()), int(numbers.max())
        if least < 0 or most >= experts:
            raise CorruptFile(
                f"{name} in {self.source.path} names expert {least if least < 0 else most} of {experts}.",
                "The file is damaged; get it again.")
        return numbers


NO_MATRICES = ("ape", "table", "experts")  # added, looked up in, listed apart


def leaves(node: object) -> Iterator[Packed | Tensor]:
    """Every weight in a tree of dataclasses, lists and named tuples; what is none, like a bias that is not there, is passed."""
    if isinstance(node, (Packed, Tensor)):
        yield node
    else:
        for child in _children(node):
            yield from leaves(child)


def matrices(weights: ModelWeights) -> Iterator[tuple[str, Weight]]:
    """Every matrix of the trunk that activations are multiplied with, by its official name; routed experts one by one."""
    yield "head.weight", weights.head
    for number, layer in enumerate(weights.layers):
        parts = ((f"layers.{number}.attn.", layer.attention), (f"layers.{number}.ffn.", replace(layer.moe, experts=Experts())))
        for prefix, part in parts:
            yield from _named(prefix, part)
        for each, expert in enumerate(layer.moe.experts):
            yield from _named(f"layers.{number}.ffn.experts.{each}.", expert)


def _named(prefix: str, node: object) -> Iterator[tuple[str, Weight]]:
    """The matrices of one part; its fields are called as the official layout calls them, but for the shared expert."""
    names = [field.name for field in fields(node)] if is_dataclass(node) else getattr(node, "_fields", ())
    for name in names:
        child = getattr(node, name)
        if name in NO_MATRICES or child is None:
            continue
        name = "shared_experts" if name == "shared" else name
        if isinstance(child, (Packed, Tensor)):
            if len(child.shape) == 2:
                yield f"{prefix}{name}.weight", child
        else:
            yield from _named(f"{prefix}{name}.", child)


def _children(node: object) -> Iterator[object]:
    if is_dataclass(node):
        yield from (getattr(node, field.name) for field in fields(node))
    elif isinstance(node, (list, tuple)):
        yield from node


def _mapped(node: Node, change: Callable[[Packed | Tensor], Tensor | Packed], left: tuple[type, ...] = ()) -> Node:
    """The same tree of dataclasses, lists and named tuples with every leaf changed, but for parts of the types in `left`."""
    if isinstance(node, (Packed, Tensor)):
        return change(node)  # type: ignore[return-value]  # a leaf stays a leaf
    if isinstance(node, left):
        return node
    if isinstance(node, list):
        return type(node)(_mapped(child, change, left) for child in node)
    if isinstance(node, tuple):
        return type(node)(*(_mapped(child, change, left) for child in node))
    if is_dataclass(node) and not isinstance(node, type):
        return replace(node, **{field.name: _mapped(getattr(node, field.name), change, left) for field in fields(node)})
    return node

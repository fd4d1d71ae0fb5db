"""The schema reproduces what was published of the releases: tensors, bytes, and both of them split in several ways."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest

from dsv4_quant import schema
from dsv4_quant.config import ModelConfig
from dsv4_quant.schema import TensorSpec, Variant
from tests.quant.releases import FLASH, FLASH_0731, PRO, PRO_0813

MTP = Variant(stages="mtp")
DSPARK = Variant(stages="dspark")
BASE = Variant(expert_dtype="fp8", scale_dtype="F32", stages="mtp", repeated_ends=True)
RELEASES: dict[str, tuple[dict[str, Any], Variant]] = {
    "flash": (FLASH, MTP), "flash-base": (FLASH, BASE), "flash-0731": (FLASH_0731, DSPARK),
    "pro": (PRO, MTP), "pro-0813": (PRO_0813, DSPARK),
    "pro-base": (PRO, Variant(expert_dtype="fp8", stages="mtp")),
}  # fmt: skip


@cache
def listed(release: str) -> tuple[TensorSpec, ...]:
    config, variant = RELEASES[release]
    return tuple(schema.tensors(ModelConfig.from_dict(config, release), variant))


def bytes_by(release: str, attribute: str) -> Counter[Any]:
    total: Counter[Any] = Counter()
    for spec in listed(release):
        total[getattr(spec, attribute)] += spec.nbytes
    return total


@pytest.mark.parametrize(
    ("release", "count", "nbytes"),
    [
        ("flash", 69_187, 159_609_485_896),
        ("flash-base", 69_189, 294_673_469_000),
        ("flash-0731", 72_317, 166_878_536_440),
        ("pro", 145_116, 864_704_792_696),
        ("pro-base", 145_116, 1_602_033_600_632),
        ("pro-0813", 149_782, 892_727_580_904),
    ],
)
def test_counts_and_bytes_as_published(release: str, count: int, nbytes: int) -> None:
    specs = listed(release)
    assert len(specs) == count
    assert len({spec.name for spec in specs}) == count
    assert sum(spec.nbytes for spec in specs) == nbytes


def test_bytes_and_tensors_by_type() -> None:
    assert bytes_by("flash", "dtype") == {
        "BF16": 2_830_518_528, "F32": 144_672_072, "F8_E4M3": 6_023_020_544, "F8_E8M0": 8_858_737_664,
        "I8": 141_733_920_768, "I64": 18_616_320,
    }  # fmt: skip
    assert Counter(spec.dtype for spec in listed("flash")) == {
        "BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34_167, "I8": 33_792, "I64": 3,
    }  # fmt: skip
    assert bytes_by("pro", "dtype") == {
        "BF16": 5_633_798_656, "F32": 351_105_656, "F8_E4M3": 23_169_335_296, "F8_E8M0": 49_150_268_416,
        "I8": 786_381_668_352, "I64": 18_616_320,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("release", "layer", "count", "nbytes"),
    [  # window-only with a table, ratio 4 with a table, ratio 128, ratio 4
        ("flash", 0, 1565, 3_566_148_952),
        ("flash", 2, 1576, 3_596_055_640),
        ("flash", 3, 1569, 3_568_596_312),
        ("flash", 42, 1576, 3_589_851_224),
        ("pro", 0, 2337, 13_874_466_328),
        ("pro", 2, 2344, 13_909_746_200),
        ("pro", 3, 2337, 13_868_262_424),
        ("pro", 60, 2344, 13_903_542_296),
    ],
)
def test_layers(release: str, layer: int, count: int, nbytes: int) -> None:
    specs = [spec for spec in listed(release) if spec.layer == layer]
    assert (len(specs), sum(spec.nbytes for spec in specs)) == (count, nbytes)


@pytest.mark.parametrize(
    ("release", "stage", "count", "nbytes"),
    [
        ("flash", 0, 1575, 3_593_787_756),
        ("pro", 0, 2343, 13_956_587_692),
        ("flash-0731", 0, 1568, 3_610_287_448),
        ("flash-0731", 1, 1565, 3_559_944_536),
        ("flash-0731", 2, 1572, 3_692_606_316),
    ],
)
def test_drafting_stages(release: str, stage: int, count: int, nbytes: int) -> None:
    specs = [spec for spec in listed(release) if spec.stage == stage]
    assert (len(specs), sum(spec.nbytes for spec in specs)) == (count, nbytes)
    assert all(spec.role == "mtp" and spec.name.startswith(f"mtp.{stage}.") for spec in specs)


@pytest.mark.parametrize(
    ("release", "routed", "shared", "ends", "streams", "one_expert"),
    [
        ("flash", 147_169_738_752, 1_082_196_480, 2_118_123_520, 135_537_756, 13_369_344),
        ("pro", 822_054_223_872, 4_029_923_520, 3_706_716_160, 336_278_412, 35_094_528),
    ],
)
def test_bytes_by_role(release: str, routed: int, shared: int, ends: int, streams: int, one_expert: int) -> None:
    roles = bytes_by(release, "role")
    assert roles["routed_expert"] == routed
    assert roles["shared_expert"] == shared
    assert roles["embed"] + roles["head"] == ends
    assert roles["hc"] == streams
    assert sum(spec.nbytes for spec in listed(release) if spec.expert == 7 and spec.layer == 5) == one_expert


@pytest.mark.parametrize(("release", "count"), [("flash", 1328), ("flash-0731", 1328), ("pro", 1894)])
def test_gguf_lists_the_trunk(release: str, count: int) -> None:
    config, _ = RELEASES[release]
    specs = list(schema.gguf_tensors(ModelConfig.from_dict(config, release)))
    assert len(specs) == len({spec.name for spec in specs}) == count
    weights = {spec.name for spec in listed(release) if spec.stage is None and not spec.name.endswith(".scale")}
    inside = [name for spec in specs for name in spec.official]
    assert len(inside) == len(weights)
    assert set(inside) == weights


def test_gguf_shapes_and_both_names() -> None:
    specs = {spec.name: spec for spec in schema.gguf_tensors(ModelConfig.from_dict(FLASH, "flash"))}
    assert specs["blk.2.ffn_down_exps.weight"].shape == (256, 4096, 2048)
    assert specs["blk.2.ffn_down_exps.weight"].official[255] == "layers.2.ffn.experts.255.w2.weight"
    assert specs["blk.2.indexer.attn_q_b.weight"].official == ("layers.2.attn.indexer.wq_b.weight",)
    assert specs["blk.3.attn_compressor_ape.weight"].shape == (128, 512)
    assert specs["blk.0.ffn_gate_tid2eid.weight"].shape == (129280, 6)
    assert specs["output_hc_fn.weight"].official == ("hc_head_fn",)
    assert schema.gguf_name("layers.9.ffn.experts.17.w3.weight") == ("blk.9.ffn_up_exps.weight", 17)


@pytest.mark.parametrize("release", list(RELEASES))
def test_variant_is_read_off_the_tensors(release: str) -> None:
    assert Variant.of({spec.name: spec for spec in listed(release)}) == RELEASES[release][1]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("lm_head.weight", "head.weight"),
        ("model.layers.3.self_attn.q_a_proj.weight_scale_inv", "layers.3.attn.wq_a.scale"),
        ("model.layers.3.self_attn.q_a_layernorm.weight", "layers.3.attn.q_norm.weight"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "layers.3.ffn.gate.bias"),
        ("model.layers.3.mlp.experts.11.up_proj.weight", "layers.3.ffn.experts.11.w3.weight"),
        ("model.layers.3.post_attention_layernorm.weight", "layers.3.ffn_norm.weight"),
    ],
)
def test_names_of_the_hugging_face_kind(theirs: str, ours: str) -> None:
    assert schema.normalise(theirs) == ours


def test_official_names_are_their_own() -> None:
    for spec in listed("flash-base"):
        assert schema.normalise(spec.name) == spec.name

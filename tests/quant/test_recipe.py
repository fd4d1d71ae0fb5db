"""Recipes, changes to them, types that fit a size, and what a plan says of models too large to be here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4_quant import recipe, schema
from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import UnsupportedModel, WrongUse
from dsv4_quant.files.headers import Header, TensorInfo
from dsv4_quant.fit import ERRORS
from dsv4_quant.formats import FORMATS
from dsv4_quant.metadata import Origin
from dsv4_quant.plan import Plan, make_plan
from dsv4_quant.recipe import KEEP, RECIPES, Rule
from dsv4_quant.schema import Variant
from tests.quant.releases import FLASH, FLASH_0731, PRO

BITS = {name: 8 * FORMATS[name].block_bytes / FORMATS[name].block for name in recipe.TYPES}


def header_of(config: dict[str, Any], variant: Variant) -> Header:
    """What the reader would find of a published release."""
    parsed, file = ModelConfig.from_dict(config, "release"), Path("release/model.safetensors")
    found = {spec.name: TensorInfo(spec.name, spec.dtype, spec.shape, file, 0, spec.nbytes)
             for spec in schema.tensors(parsed, variant)}
    return Header(Path("release"), "official", parsed, config, {}, found, [])


@pytest.fixture(scope="module")
def flash() -> Header:
    return header_of(FLASH, Variant(stages="mtp"))


def planned(header: Header, name: str = "q2", **options: Any) -> Plan:
    return make_plan(header, Path("out.gguf"), recipe.named(name), Origin("release"), **options)


def types(plan: Plan, leaf: str) -> list[str]:
    return [target.type for target in plan.targets if target.name.endswith(leaf)]


@pytest.mark.parametrize(("config", "nbytes"), [(FLASH, 156_373_008_732), (PRO, 852_158_383_500)], ids=["flash", "pro"])
def test_mxfp4_with_a_bf16_head_is_what_llamacpps_converter_makes(config: dict[str, Any], nbytes: int) -> None:
    """To the byte, without padding (spec/checkpoint.md section 5.2)."""
    plan = planned(header_of(config, Variant(stages="mtp")), "mxfp4", changes=recipe.rules_of({"output": "bf16"}))
    assert sum(target.nbytes for target in plan.targets) == nbytes


def test_the_named_recipes(flash: Header) -> None:
    sizes = {name: planned(flash, name).nbytes for name in RECIPES}
    assert sizes["q4"] > sizes["mxfp4"] > sizes["q3"] > sizes["q2"] > sizes["q1"]
    assert 80e9 < sizes["q2"] < 90e9
    plan = planned(flash, "q2")
    assert set(types(plan, "ffn_gate_exps.weight")) == set(types(plan, "ffn_up_exps.weight")) == {"iq2_xxs"}
    assert set(types(plan, "ffn_down_exps.weight")) == {"q2_k"}
    assert set(types(plan, "attn_q_b.weight")) == set(types(plan, "ffn_up_shexp.weight")) == {"q8_0"}
    assert set(types(plan, "ffn_gate_inp.weight")) == {"bf16"}
    assert set(types(plan, "tid2eid.weight")) == {"i32"}
    assert all(target.type == "f32" for target in plan.targets if len(target.shape) == 1)


def test_changes_by_role_and_layer(flash: Header) -> None:
    rules = recipe.rules_of({"down": "5=q6_k", "experts": "q3_k,0-1=Q8_0,42=mxfp4", "attention": "bf16"})
    plan = planned(flash, "q2", changes=rules)
    gates, downs = types(plan, "ffn_gate_exps.weight"), types(plan, "ffn_down_exps.weight")
    assert gates == ["q8_0", "q8_0", *["q3_k"] * 40, "mxfp4"] == types(plan, "ffn_up_exps.weight")
    assert downs == ["q8_0", "q8_0", *["q3_k"] * 3, "q6_k", *["q3_k"] * 36, "mxfp4"]
    assert set(types(plan, "attn_kv.weight")) == {"bf16"}


def test_a_recipe_leaves_alone_what_it_does_not_name() -> None:
    assert recipe.named("Q2").type_of("rest", 3) == recipe.named("mxfp4").type_of("embed", None) == KEEP
    assert Rule("down", "q8_0", 3, 4).holds("down", 4)
    assert not Rule("down", "q8_0", 3, 4).holds("down", None)


@pytest.mark.parametrize(("changes", "message", "hint"), [
    ({"experts": "q3_kk"}, "no type called q3_kk", "q3_k"),
    ({"experts": ""}, "no type called ''", "q8_0"),
    ({"experts": "a-b=q8_0"}, "'a-b' is no layer", "7=TYPE"),
    ({"experts": "9-3=q8_0"}, "'9-3' is no layer", "7=TYPE"),
    ({"expert": "q8_0"}, "no role called expert", "experts"),
])
def test_unknown_words_bring_the_nearest(changes: dict[str, str], message: str, hint: str) -> None:
    with pytest.raises(WrongUse, match=message) as caught:
        recipe.rules_of(changes)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_an_unknown_recipe(flash: Header) -> None:
    with pytest.raises(WrongUse, match="no recipe called q22") as caught:
        planned(flash, "q22")
    assert "q2" in caught.value.hint


def test_layers_that_are_not_there(flash: Header) -> None:
    with pytest.raises(WrongUse, match="layers 0 to 42"):
        planned(flash, changes=recipe.rules_of({"down": "43=q8_0"}))


def test_rows_that_no_block_fills() -> None:
    """Experts of width 96 take blocks of 32, not of 256."""
    narrow = header_of(FLASH | {"moe_intermediate_size": 96}, Variant())
    with pytest.raises(WrongUse, match=r"blk.0.ffn_down_exps.weight have 96 elements.*q2_k") as caught:
        planned(narrow, "q2")
    assert "q8_0, mxfp4" in caught.value.hint
    assert "--down" in caught.value.hint
    plan = planned(narrow, "mxfp4")
    assert set(types(plan, "ffn_down_exps.weight")) == {"mxfp4"}


@pytest.mark.parametrize("size", [70, 80, 110, 400])
def test_a_wanted_size_is_used_and_kept(flash: Header, size: int) -> None:
    plan = planned(flash, target_size=size * 10**9)
    assert plan.nbytes <= size * 10**9
    whole = planned(flash, "mxfp4").nbytes
    if size * 10**9 < whole:  # what is left would not raise a single matrix by a step
        assert plan.nbytes > 0.99 * size * 10**9
    else:  # exact experts are the best there is, however much room is left
        assert {t.type for t in plan.targets if t.slot in ("gate_up", "down")} == {"mxfp4"}


def test_the_errors_of_types_are_those_of_our_encoders() -> None:
    draw = torch.Generator().manual_seed(1)
    rows, matters = torch.randn(4, 4096, generator=draw) * 0.02, torch.rand(4096, generator=draw) + 0.1
    for name, expected in ERRORS.items():
        encode = FORMATS[name].encode
        assert encode is not None
        off = FORMATS[name].decode(encode(rows, matters), None) - rows
        error = float((matters * off.square()).sum() / (matters * rows.square()).sum())
        assert error == pytest.approx(expected, rel=0.1), name


def test_more_room_never_means_more_error(flash: Header) -> None:
    errors = []
    for size in range(70, 160, 20):
        targets = [t for t in planned(flash, target_size=size * 10**9).targets if t.slot in ("gate_up", "down")]
        errors.append(sum(t.weights * (0 if t.type == "mxfp4" else ERRORS[t.type]) for t in targets))
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors)


def test_the_ends_get_their_bits_first(flash: Header) -> None:
    """And gate and up share a type, as some loaders demand."""
    plan = planned(flash, target_size=85 * 10**9)
    gates, ups = types(plan, "ffn_gate_exps.weight"), types(plan, "ffn_up_exps.weight")
    assert gates == ups
    assert min(BITS[gates[0]], BITS[gates[42]]) > BITS[gates[20]]


def test_what_was_said_of_a_layer_is_not_fitted(flash: Header) -> None:
    plan = planned(flash, target_size=90 * 10**9, changes=recipe.rules_of({"down": "20=q8_0"}))
    assert types(plan, "ffn_down_exps.weight")[20] == "q8_0"
    assert plan.nbytes <= 90 * 10**9


def test_a_size_that_cannot_be_reached(flash: Header) -> None:
    with pytest.raises(WrongUse, match="10,000,000,000 bytes are too few: the smallest types make 68,"):
        planned(flash, target_size=10**10)


def test_parts_are_no_larger_than_asked(flash: Header) -> None:
    plan = planned(flash, "mxfp4", part_size=40 * 10**9)
    assert [part.path.name for part in plan.parts] == [f"out-0000{n}-of-00004.gguf" for n in range(1, 5)]
    assert all(part.nbytes <= 40 * 10**9 for part in plan.parts)
    assert sum(part.nbytes for part in plan.parts) == plan.nbytes


def test_drafting_stages_are_asked_for_by_their_name(flash: Header) -> None:
    assert planned(flash, stages="mtp").targets[3].name == "blk.43.nextn.eh_proj.weight"
    with pytest.raises(UnsupportedModel, match="has mtp stages, not dspark"):
        planned(flash, stages="dspark")
    newer = header_of(FLASH_0731, Variant(stages="dspark"))
    assert len(planned(newer, stages="dspark").targets) == 81  # as llama.cpp's converter writes
    bare = replace(flash, tensors={name: info for name, info in flash.tensors.items() if not name.startswith("mtp")})
    with pytest.raises(UnsupportedModel, match="has no drafting stages"):
        planned(bare, stages="mtp")

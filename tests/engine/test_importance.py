"""Importance matrices: sums against hooks in transformers' model; stopped and resumed to the same bytes; the calibration set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_kernels import backends
from dsv4_kernels.linear import linear
from dsv4_quant.files import open_source
from dsv4_quant.imatrix import Imatrix
from dsv4cli.engine import Engine, calibration, importance
from dsv4cli.errors import UsageError
from dsv4cli.model.importance import Collector
from dsv4cli.model.transformer import Model
from tests.support.synth import Checkpoint, Shape, transformers_model

SHAPE = Shape(ratios=(0, 4, 128), experts=16, index_topk=8)
TOKENS = 60
MODULES = {  # of a layer: what meets the input of each module, by the matrix that GGUF calls so
    "attn_q_a": "self_attn.q_a_proj", "attn_q_b": "self_attn.q_b_proj", "attn_kv": "self_attn.kv_proj",
    "attn_output_a": "self_attn.o_a_proj", "attn_output_b": "self_attn.o_b_proj",
    "attn_compressor_kv": "self_attn.compressor.kv_proj", "attn_compressor_gate": "self_attn.compressor.gate_proj",
    "indexer.attn_q_b": "self_attn.compressor.indexer.q_b_proj",
    "indexer.proj": "self_attn.compressor.indexer.scorer.weights_proj",
    "indexer_compressor_kv": "self_attn.compressor.indexer.kv_proj",
    "indexer_compressor_gate": "self_attn.compressor.indexer.gate_proj", "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj", "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}  # fmt: skip


def squares(x: Tensor) -> Tensor:
    return x.detach().double().flatten(0, -2).square().sum(0)


def expected(checkpoint: Checkpoint, ids: Tensor) -> dict[str, Tensor]:
    """Sums of squares, float64, of what meets the matrices of transformers' model; [experts, columns] for a stack."""
    model, found = transformers_model(checkpoint), {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, given: found.update({name: squares(given[0])})

    def keep_experts(layer: int) -> Callable[..., None]:
        def hook(module: Any, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x, chosen, shares = (*given, *named.values())
            inward = torch.zeros(SHAPE.experts, SHAPE.hidden, dtype=torch.float64)
            down = torch.zeros(SHAPE.experts, SHAPE.width, dtype=torch.float64)
            for token, slot in ((t, s) for t in range(len(chosen)) for s in range(chosen.shape[1])):
                expert = int(chosen[token, slot])
                inward[expert] += x[token].double().square()
                gate, up = (module.gate_up_proj[expert] @ x[token]).chunk(2)
                hidden = torch.nn.functional.silu(gate.clamp(max=10)) * up.clamp(-10, 10) * shares[token, slot]
                down[expert] += hidden.double().square()
            found.update({f"blk.{layer}.ffn_{kind}_exps.weight": inward for kind in ("gate", "up")})
            found[f"blk.{layer}.ffn_down_exps.weight"] = down

        return hook

    modules = dict(model.named_modules())
    modules["lm_head"].register_forward_pre_hook(keep("output.weight"))
    for layer in range(len(SHAPE.ratios)):
        for ours, theirs in MODULES.items():
            if module := modules.get(f"model.layers.{layer}.{theirs}"):
                module.register_forward_pre_hook(keep(f"blk.{layer}.{ours}.weight"))
        modules[f"model.layers.{layer}.mlp.experts"].register_forward_pre_hook(keep_experts(layer), with_kwargs=True)
    with torch.no_grad():
        model(ids[None], use_cache=False)
    return found


@pytest.mark.filterwarnings("default")  # theirs to mend
@pytest.mark.parametrize("expand_limit", [0, 1 << 40])
def test_what_is_collected_is_what_meets_the_matrices(tmp_path: Path, expand_limit: int) -> None:
    checkpoint = Checkpoint(SHAPE, seed=5)
    ids = torch.randint(0, SHAPE.vocab, (TOKENS,), generator=torch.Generator().manual_seed(5))
    model = Model.bind(open_source(checkpoint.write(tmp_path)), numerics="plain", expand_limit=expand_limit)
    collector, state = Collector(model), model.new_state(TOKENS)
    with backends.watched(collector):
        for piece in ids.split(25):
            model.forward(piece, state, logits="all")
    wanted, found = expected(checkpoint, ids), collector.entries()
    assert set(found) == set(wanted)
    for name, sums in wanted.items():
        got = found[name].sums.double()
        assert torch.allclose(got, sums.reshape(got.shape), rtol=2e-3, atol=1e-4 * float(sums.max())), name
    assert found["blk.1.attn_q_a.weight"].counts.tolist() == [TOKENS]
    assert found["blk.1.ffn_down_exps.weight"].counts.sum() == TOKENS * SHAPE.chosen
    unvisited = [(layer, expert) for layer in range(3) for expert in range(16)
                 if not wanted[f"blk.{layer}.ffn_gate_exps.weight"][expert].any()]
    assert list(collector.unvisited()) == unvisited


def test_watching_changes_nothing_and_ends() -> None:
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    seen: list[str] = []
    before = linear(x, weight)
    with backends.watched(lambda door, given: seen.append(door)):
        assert torch.equal(linear(x, weight), before)
    linear(x, weight)
    assert seen == ["linear"]


@pytest.fixture(scope="module")
def tiny() -> Engine:
    return Engine.open("tiny")


@pytest.fixture(scope="module")
def samples(tiny: Engine) -> list[list[int]]:
    ids = tiny.tokenizer.encode_text("Emma lives in Paris. What is 27 + 35? " * 12)
    return list(importance.in_windows(ids, 0, 40))


def collect(engine: Engine, samples: list[list[int]], out: Path, **options: Any) -> importance.Collected:
    return importance.collect(engine, samples, out, dataset="words", window=40, **options)


def test_stopped_and_resumed_it_is_the_same_file(tiny: Engine, samples: list[list[int]], tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.gguf", tmp_path / "broken.gguf"
    collect(tiny, samples, whole)
    total = sum(map(len, samples))

    def stop_at(share: float) -> Callable[[int, int], None]:
        def progress(done: int, all_of_them: int) -> None:
            assert all_of_them == total
            if done > share * total:
                raise KeyboardInterrupt

        return progress

    for share in (0.2, 0.5, 0.8):
        with pytest.raises(KeyboardInterrupt):
            collect(tiny, samples, broken, progress=stop_at(share), save_seconds=0)
        assert not broken.exists()
    found = collect(tiny, samples, broken)
    assert found.resumed > len(samples) // 2
    assert broken.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.gguf", "whole.gguf"]


@pytest.mark.parametrize("draft", [b"", b"GGUF", b"nonsense" * 9])
def test_a_draft_that_is_none_is_not_gone_on_with(tiny: Engine, samples: list[list[int]], tmp_path: Path, draft: bytes) -> None:
    (tmp_path / "a.gguf.part").write_bytes(draft)
    assert collect(tiny, samples[:2], tmp_path / "a.gguf").resumed == 0


def test_a_draft_of_other_work_is_not_gone_on_with(tiny: Engine, samples: list[list[int]], tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(tiny, samples, tmp_path / "a.gguf", progress=stop, save_seconds=0)
    assert (tmp_path / "a.gguf.part").exists()
    assert collect(tiny, samples[1:], tmp_path / "a.gguf").resumed == 0


def test_the_file_fits_the_model(tiny: Engine, samples: list[list[int]], tmp_path: Path) -> None:
    collect(tiny, samples, tmp_path / "a.gguf")
    found = Imatrix.open(tmp_path / "a.gguf", tiny.config)
    assert found.keys == {"file": "a.gguf", "dataset": "words", "entries_count": len(found.entries),
                          "chunks_count": -(-sum(map(len, samples)) // 40)}
    squared = found.for_tensor("blk.0.attn_q_a.weight", None)
    assert squared is not None
    assert squared.shape == (tiny.config.hidden_size,)
    assert bool((squared > 0).all())


def test_the_calibration_set(tiny: Engine) -> None:
    found = calibration.samples(tiny, 512)
    assert found == calibration.samples(tiny, 512)
    assert all(0 < len(sample) <= 512 for sample in found[:-1])
    assert len(found[-1]) == 2048
    assert all(sample[0] == tiny.config.bos_token_id for sample in found)
    assert sum(map(len, found)) > 50_000
    marks = {tiny.tokenizer.control(mark) for mark in ("<think>", "</think>", "｜DSML｜", "<｜User｜>", "<｜Assistant｜>")}
    assert marks <= {token for sample in found for token in sample}


def test_every_conversation_is_a_whole_one() -> None:
    for chat in calibration.generated():
        assert chat["messages"][-1]["role"] == "assistant"
        for message in chat["messages"]:
            for call in message.get("tool_calls", ()):
                assert set(json.loads(call["function"]["arguments"])) == {"thing", "place", "count", "used"}


def test_unvisited_experts_in_words() -> None:
    assert importance.named([(0, 3), (0, 5), (2, 1)]) == "layer 0: 3, 5; layer 2: 1"


def test_nothing_to_collect_over(tiny: Engine, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="empty"):
        collect(tiny, [], tmp_path / "a.gguf")

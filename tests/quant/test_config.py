"""A configuration is read strictly: what is missing, mistyped, absurd or of another architecture is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import CorruptFile, UnsupportedModel
from tests.quant.releases import FLASH, FLASH_0731, PRO, PRO_0813

TINY = Path(__file__).parents[2] / "dsv4cli/assets/tiny"


def test_flash() -> None:
    config = ModelConfig.from_dict(FLASH, "config.json")
    assert config.stages == 1
    assert [config.ratio(layer) for layer in (0, 1, 2, 3, 42)] == [0, 0, 4, 128, 4]
    assert [config.is_hash(layer) for layer in (0, 2, 3)] == [True, True, False]
    assert config.rope_scaling.factor == 16
    assert isinstance(config.rope_theta, float)


def test_pro_and_stages() -> None:
    """`num_nextn_predict_layers` says 1 in all of them."""
    assert ModelConfig.from_dict(PRO, "config.json").ratio(0) == 128
    assert ModelConfig.from_dict(FLASH_0731, "config.json").stages == 3
    found = ModelConfig.from_dict(PRO_0813, "config.json")
    assert (found.stages, found.dspark_markov_rank, found.dspark_target_layer_ids) == (3, 512, (58, 59, 60))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": None}, "hidden_size is None, not a whole number"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', not a whole number"),
        ({"hidden_size": 4096.5}, "hidden_size is 4096.5"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": -4096}, "hidden_size is -4096; 32 to"),
        ({"hidden_size": 100}, "hidden_size is 100, not a multiple of 32"),
        ({"hidden_size": float("inf")}, "hidden_size is inf"),
        ({"hidden_size": 10**400}, "hidden_size is 1000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, not a number"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        ({"n_routed_experts": 10**9}, "n_routed_experts is 1000000000; 1 to"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; 1 to"),
        ({"num_hidden_layers": 45}, "44 entries for 45 layers"),
        ({"num_experts_per_tok": 257}, "257 experts of 256"),
        ({"hc_sinkhorn_iters": 10**6}, "hc_sinkhorn_iters is 1000000"),
        ({"compress_ratios": [0] * 43 + [3]}, "compress_ratios has 3; only 0, 4, 128"),
        ({"compress_ratios": [0.5] * 44}, "not a list of whole numbers"),
        ({"compress_ratios": 4}, "compress_ratios is 4"),
        ({"o_groups": 7}, "64 heads do not make 7 o_groups"),
        ({"qk_rope_head_dim": 256}, "qk_rope_head_dim is 256 in heads of 512 and 128"),
        ({"rope_scaling": None}, "rope_scaling is None, not an object"),
        ({"rope_scaling": {"factor": 16}}, "rope_scaling has no original_max_position_embeddings"),
        ({"rope_scaling": FLASH["rope_scaling"] | {"factor": "x"}}, r"rope_scaling\.factor is 'x'"),
        ({"rope_scaling": FLASH["rope_scaling"] | {"factor": 0}}, "factor=0"),
    ],
)
def test_values_that_cannot_be(change: dict[str, Any], says: str) -> None:
    with pytest.raises(CorruptFile, match=says) as error:
        ModelConfig.from_dict(FLASH | change, "some/config.json")
    assert error.value.message.startswith("some/config.json")
    assert error.value.exit_code == 4
    assert error.value.hint
    assert len(error.value.message) < 700


@pytest.mark.parametrize(
    "key", ["vocab_size", "compress_ratios", "rope_scaling", "hc_eps", "index_topk", "swiglu_limit"]
)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(CorruptFile, match=f"has no {key}"):
        ModelConfig.from_dict({name: value for name, value in FLASH.items() if name != key}, "config.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "deepseek_v41", "architectures": ["DeepseekV41ForCausalLM"]}, "V4.1 .*not supported yet"),
        (
            {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]},
            "a DeepseekV3ForCausalLM, not DeepSeek-V4",
        ),
        ({"model_type": "llama", "architectures": []}, "a llama, not"),
        ({"model_type": None, "architectures": None}, "model without a model_type"),
        ({"model_type": ["deepseek_v4"], "architectures": "x"}, "not DeepSeek-V4"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax', not 'sqrtsoftplus'"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says) as error:
        ModelConfig.from_dict(FLASH | change, "config.json")
    assert error.value.exit_code == 1
    assert error.value.hint


def test_messages_are_one_safe_line() -> None:
    """Names and values come out of files: no escape sequence of theirs may reach the terminal, no megabyte either."""
    error = CorruptFile("file: \x1b[2J\x9b1m" + "x" * 1_000_000 + "\nend")
    assert "\x1b" not in str(error)
    assert "\x9b" not in error.message
    assert "\n" not in error.message
    assert len(error.message) < 700
    assert error.message.startswith("file: ")
    assert error.message.endswith("end")


def test_headers_are_read_without_torch() -> None:
    script = (
        "import sys, json; from dsv4_quant.files.headers import read_header; from dsv4_quant import schema\n"
        "header = read_header(sys.argv[1])\n"
        "print(json.dumps([len(header.tensors), sorted({'torch', 'numpy', 'gguf', 'safetensors'} & set(sys.modules))]))"
    )
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}  # works from a bare checkout as well
    done = subprocess.run(
        [sys.executable, "-c", script, str(TINY)], capture_output=True, text=True, check=True, env=paths
    )
    count, heavy = json.loads(done.stdout)
    assert count > 100
    assert heavy == []

"""What a config.json may say: both spellings of rope, and a refusal by name for everything else."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from kvfold.core.errors import Refused
from kvfold.models.config import ModelConfig
from kvfold.models.registry import FAMILIES
from kvfold.models.rotary import build_rotary

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
QWEN2 = {
    **LLAMA,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "use_sliding_window": False,
    "sliding_window": 128,
    "max_window_layers": 2,
}
MISTRAL = {
    **LLAMA,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 128,
}
PHI3 = {
    **LLAMA,
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "original_max_position_embeddings": 1024,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def without(raw: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in names}


@pytest.mark.parametrize("settings", [{}, {"rope_type": "llama3", **LLAMA3}])
def test_both_spellings_of_rope_mean_the_same(settings: dict[str, Any]):
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": settings or None}
    new = {
        **without(LLAMA, "rope_theta", "torch_dtype"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, **settings},
        "dtype": "bfloat16",
    }
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(old).rope.theta == 5e5


def test_old_names_of_longrope():
    expected = ModelConfig.from_hf({**PHI3, "rope_scaling": {"rope_type": "longrope", **LONGROPE}})
    assert expected.rope.kind == "longrope"
    for name in ("su", "yarn"):
        scaling = {"type": name, **LONGROPE}
        assert ModelConfig.from_hf({**PHI3, "rope_scaling": scaling}) == expected


def test_partial_rotation_in_either_place():
    inside = {"rope_type": "default", "partial_rotary_factor": 0.5}
    for extra in ({"partial_rotary_factor": 0.5}, {"rope_parameters": inside}):
        assert ModelConfig.from_hf({**PHI3, **extra}).rope.width == 8


def test_a_config_of_the_first_llama():
    config = ModelConfig.from_hf(without(LLAMA, "num_key_value_heads", "rope_theta", "model_type"))
    assert (config.n_kv_heads, config.rope.theta, config.head_dim) == (4, 10000.0, 16)


def test_yarn_extends_the_stated_length():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert ModelConfig.from_hf({**QWEN2, "rope_scaling": scaling}).max_position == 16384


@pytest.mark.parametrize(
    ("raw", "windows"),
    [
        (QWEN2, (None, None, None)),
        ({**QWEN2, "use_sliding_window": True}, (None, None, 128)),
        (
            {**QWEN2, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 3},
            (128, 128, 128),
        ),
        (MISTRAL, (128, 128, 128)),
        ({**MISTRAL, "sliding_window": None}, (None, None, None)),
    ],
)
def test_windows(raw: dict[str, Any], windows: tuple[int | None, ...]):
    assert ModelConfig.from_hf(raw).windows == windows


@pytest.mark.parametrize(
    ("eos", "ids"), [(None, ()), (0, (0,)), (7, (7,)), ([7, 9], (7, 9))], ids=str
)
def test_end_of_text(eos: object, ids: tuple[int, ...]):
    assert ModelConfig.from_hf({**LLAMA, "eos_token_id": eos}).eos_ids == ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "torch.float16"])
def test_dtypes(dtype: str):
    raw = {**LLAMA, "torch_dtype": dtype}
    assert ModelConfig.from_hf(raw).checkpoint_dtype == dtype.removeprefix("torch.")


def test_inert_fields_pass():
    inert = {
        "_name_or_path": "somewhere",
        "initializer_range": 0.02,
        "attention_dropout": 0.1,
        "use_cache": True,
        "transformers_version": "4.40.0",
        "pretraining_tp": 1,
        "some_new_switch": False,
        "quantization_config": None,
    }
    assert ModelConfig.from_hf({**LLAMA, **inert}) == ModelConfig.from_hf(LLAMA)


REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
    "hidden_act",
)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_field_is_named(name: str):
    with pytest.raises(Refused, match=f"{name} is missing"):
        ModelConfig.from_hf(without(LLAMA, name))


def test_what_one_family_may_omit_another_may_not():
    qwen3 = {**QWEN2, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    assert ModelConfig.from_hf({**qwen3, "head_dim": 128}).head_dim == 128
    with pytest.raises(Refused, match="head_dim is missing"):
        ModelConfig.from_hf(qwen3)
    for name in ("num_key_value_heads", "sliding_window", "rope_theta"):
        with pytest.raises(Refused, match=f"{name} is missing"):
            ModelConfig.from_hf(without(MISTRAL, name))


WRONG = {
    "not an integer": ({"hidden_size": "64"}, "hidden_size is '64'"),
    "a boolean for an integer": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "no layers": ({"num_hidden_layers": 0}, "at least 1"),
    "heads do not divide": ({"num_key_value_heads": 3}, "divisor of 4"),
    "head_dim unknowable": ({"hidden_size": 66}, "head_dim is None"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "another model type": ({"model_type": "gemma"}, "model_type is 'gemma'"),
    "eps of zero": ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
    "a text for a flag": ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    "stored as fp8": ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "a multiplier": ({"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0"),
    "a window on llama": ({"sliding_window": 128}, "sliding_window = 128"),
    "unknown rope": ({"rope_scaling": {"type": "ntk-by-parts", "factor": 2.0}}, "ntk-by-parts"),
    "su on llama": ({"rope_scaling": {"type": "su", **LONGROPE}}, "type is 'su'"),
    "two rope types": (
        {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
        "same as rope_type",
    ),
    "rope without factor": ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
    "rope without trained length": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        "original_max_position_embeddings is missing",
    ),
    "rope with a stranger": (
        {"rope_scaling": {"type": "default", "mrope_section": [1, 2]}},
        "mrope_section",
    ),
    "rope said twice": (
        {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "linear"}},
        "equal to rope_parameters",
    ),
    "theta said twice": ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 10000.0"),
    "an odd rotation": ({"partial_rotary_factor": 0.2}, "rotates 3 of 16"),
    "bands out of order": (
        {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
        "greater than low_freq_factor",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_field_is_named(case: str):
    changes, message = WRONG[case]
    with pytest.raises(Refused, match=r"config\.json") as refusal:
        ModelConfig.from_hf({**LLAMA, **changes})
    assert message in refusal.value.message
    assert refusal.value.param == "model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
        ({"use_sliding_window": True, "layer_types": ["full_attention"]}, "list of 3"),
        ({"use_sliding_window": True, "layer_types": ["linear_attention"] * 3}, "list of 3"),
        (
            {
                "use_sliding_window": True,
                "sliding_window": None,
                "layer_types": ["sliding_attention"] * 3,
            },
            "sliding_window is None",
        ),
    ],
)
def test_contradicting_windows(changes: dict[str, Any], message: str):
    with pytest.raises(Refused, match=message):
        ModelConfig.from_hf({**QWEN2, **changes})


def test_longrope_factors_are_counted():
    scaling = {"type": "longrope", **LONGROPE, "long_factor": [2.0] * 7}
    with pytest.raises(Refused, match="long_factor must be a list of 8"):
        ModelConfig.from_hf({**PHI3, "rope_scaling": scaling})


def test_remote_code_is_refused_with_the_way_out():
    auto_map = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    with pytest.raises(Refused, match=r"never run; Phi3ForCausalLM is built in.*delete auto_map"):
        ModelConfig.from_hf({**PHI3, "auto_map": auto_map})
    unknown = {**PHI3, "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    with pytest.raises(Refused, match=r"never run; this build computes .*LlamaForCausalLM"):
        ModelConfig.from_hf(unknown)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLn", "os:system", ""])
def test_unknown_architectures_are_refused_with_the_known_ones(name: str):
    with pytest.raises(Refused) as refusal:
        ModelConfig.from_hf({**LLAMA, "architectures": [name]})
    assert all(known in refusal.value.message for known in FAMILIES)


@pytest.mark.parametrize("names", [None, [], "LlamaForCausalLM", ["LlamaForCausalLM", "X"], [3]])
def test_architectures_must_be_one_name(names: object):
    with pytest.raises(Refused, match="list of one name"):
        ModelConfig.from_hf({**LLAMA, "architectures": names})


def test_dynamic_rope_is_refused_beyond_the_trained_length():
    scaling = {"type": "dynamic", "factor": 2.0}
    rope = ModelConfig.from_hf({**LLAMA, "rope_scaling": scaling}).rope
    plain = replace(rope, kind="default", factor=1.0)
    cpu = torch.device("cpu")
    table, expected = (build_rotary(r, 4096, cpu) for r in (rope, plain))
    assert torch.equal(table.cos, expected.cos)
    with pytest.raises(Refused, match="--max-model-len 4096"):
        build_rotary(rope, 4097, cpu)


def test_longrope_chooses_its_factors_once_by_the_longest_sequence():
    rope = ModelConfig.from_hf({**PHI3, "rope_scaling": {"type": "longrope", **LONGROPE}}).rope
    short, long = (build_rotary(rope, n, torch.device("cpu")) for n in (1024, 1025))
    assert short.cos.shape == (1024, 8)
    assert not torch.allclose(short.cos[1], long.cos[1])
    # Position 0 is not turned: what remains is the attention factor, sqrt(1 + ln 4 / ln 1024).
    assert torch.allclose(short.cos[0], torch.tensor(1.2**0.5))

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_dgrpo.checkpoint.hf.families import read_spec, rope_parameters
from megatron_dgrpo.checkpoint.hf.mapping import rules
from megatron_dgrpo.config.rope import DefaultRope, YarnRope
from megatron_dgrpo.errors import ConversionError
from megatron_dgrpo.model.spec import ModelSpec, Rope
from megatron_dgrpo.parallel.groups import Grid


def _spec(**changes: object) -> ModelSpec:
    settings: dict[str, object] = {
        "architecture": "Qwen3ForCausalLM",
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_size": 24,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 4,
        "vocab_size": 37,
        "tied": False,
        "norm_eps": 1e-6,
        "rope": Rope(1e4),
        "max_positions": 64,
        "qk_norm": True,
    }
    return ModelSpec(**(settings | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_spans_cover_every_hugging_face_index_and_every_parameter_index_once(tp: int) -> None:
    spec = _spec()
    seen_local: dict[tuple[str, int], list[int]] = {}
    for rule in rules(spec):
        axis_length = rule.hf_shape[rule.axis or 0]
        seen_hf = np.zeros(axis_length, int)
        for rank in range(tp):
            for span in rule.spans(rank, tp):
                seen_hf[span.hf : span.hf + span.length] += 1
                seen_local.setdefault((rule.parameter, rank), []).extend(range(span.local, span.local + span.length))
        assert (seen_hf == (1 if rule.axis is not None else tp)).all(), rule.hf_name
    sizes = {
        "linear_qkv": (8 + 2 * 2) * 4 // tp,
        "linear_proj": 32 // tp,
        "linear_fc1": 2 * 24 // tp,
        "linear_fc2": 24 // tp,
        "q_layernorm": 4,
        "k_layernorm": 4,
        "layernorm": 16,
    }
    for (parameter, _), indices in seen_local.items():
        assert len(set(indices)) == len(indices), parameter
        for part, size in sizes.items():
            if part in parameter and not (
                part == "layernorm" and "_layernorm" in parameter and ("q_" in parameter or "k_" in parameter)
            ):
                assert sorted(indices) == list(range(size)), parameter
                break


def test_a_query_head_lies_with_its_key_value_head() -> None:
    """With 2 key-value heads and 8 heads, parameter rows are q0 q1 q2 q3 k0 v0 | q4 q5 q6 q7 k1 v1, 4 rows each."""
    table = {rule.hf_name.split(".")[-2]: rule for rule in rules(_spec()) if ".0.self_attn." in rule.hf_name}
    assert table["q_proj"].spans(0, 1) == [(0, 0, 16), (24, 16, 16)]
    assert table["k_proj"].spans(0, 1) == [(16, 0, 4), (40, 4, 4)]
    assert table["v_proj"].spans(1, 2) == [(20, 4, 4)]
    assert table["q_proj"].spans(1, 4) == [(0, 12, 4)] and table["v_proj"].spans(1, 4) == [(8, 0, 4)]


def test_a_vocabulary_that_tensor_parallelism_does_not_divide() -> None:
    embedding = rules(_spec())[0]
    assert [embedding.spans(rank, 4) for rank in range(4)] == [[(0, 0, 10)], [(0, 10, 10)], [(0, 20, 10)], [(0, 30, 7)]]
    last = rules(_spec(vocab_size=3))[0]
    assert last.spans(3, 4) == []  # a shard that is all padding


def _config(tmp_path: Path, **changes: object) -> Path:
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 37,
        "rope_theta": 1e6,
    }
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))
    return tmp_path


def test_rope_base_of_either_config_form(tmp_path: Path) -> None:
    assert read_spec(_config(tmp_path)).rope == Rope(1e6)
    parameters = {"rope_type": "default", "rope_theta": 5e5}
    assert read_spec(_config(tmp_path, rope_theta=None, rope_parameters=parameters)).rope == Rope(5e5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel; known here: .*Qwen3ForCausalLM"),
        ({"architectures": None}, r"\(none\); known here"),
        ({"hidden_size": None, "vocab_size": "many"}, r"(?s)hidden_size is missing.*vocab_size is missing"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads=3"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported"),
        ({"rope_theta": None}, "rope_theta is missing"),
    ],
)
def test_a_config_that_cannot_be_built(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConversionError, match=says):
        read_spec(_config(tmp_path, **changes))


@pytest.mark.parametrize(("architecture", "changes", "says"), [
    ("MistralForCausalLM", {}, r"sliding_window=4096 \(by default\) is not supported for Mistral.*supported: null"),
    ("MistralForCausalLM", {"sliding_window": 128}, "sliding_window=128 is not supported"),
    ("Qwen2ForCausalLM", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
    ("Qwen2ForCausalLM", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}, "(?s)attention_bias=True.*mlp_bias=True"),
    ("LlamaForCausalLM", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "(?s)low_freq_factor.*original"),
    ("LlamaForCausalLM", {"rope_scaling": {"type": "yarn"}}, "rope type 'yarn' needs factor, a positive number"),
    ("Qwen3ForCausalLM", {"quantization_config": {"bits": 4}}, "quantised weights can't be trained"),
    ("Qwen3MoeForCausalLM", {}, "(?s)num_experts is missing.*num_experts_per_tok is missing.*moe_intermediate_size"),
    ("Qwen3MoeForCausalLM", {"num_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 8}, "exceeds num"),
    ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0], "decoder_sparse_step": 2}, "(?s)decoder_sparse_step=2.*mlp_only"),
])  # fmt: skip
def test_what_a_family_does_not_have_is_refused(
    tmp_path: Path, architecture: str, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(ConversionError, match=says):
        read_spec(_config(tmp_path, architectures=[architecture], **changes))


def test_a_rope_of_the_configs_choice(tmp_path: Path) -> None:
    folder = _config(tmp_path, max_position_embeddings=32768)
    spec = read_spec(folder, YarnRope(kind="yarn", factor=4, original_max_positions=32768))
    assert (spec.rope.base, spec.rope.factor, spec.max_positions) == (1e6, 4.0, 131072)
    assert spec.rope.attention_factor == pytest.approx(0.1 * np.log(4) + 1)
    (tmp_path / "again").mkdir()
    assert (
        read_spec(_config(tmp_path / "again", rope_theta=None, rope_parameters=rope_parameters(spec.rope))).rope
        == spec.rope
    )
    assert read_spec(folder, DefaultRope(kind="default", base=5e5)).rope == Rope(5e5)


def test_experts_lie_on_their_ranks_and_one_rank_answers_for_each_part() -> None:
    spec = _spec(qk_norm=False, qkv_bias=True, num_experts=4, experts_per_token=2, tied=True)
    for sizes in ({"tp": 2, "dp": 2, "ep": 2}, {"tp": 2, "dp": 2, "etp": 2}, {"dp": 2, "pp": 2, "ep": 2}):
        grid = Grid(**({"tp": 1, "cp": 1, "dp": 1, "pp": 1, "first_rank": 0, "rank": 0} | sizes))
        for rule in rules(spec):
            answered = np.zeros(rule.hf_shape[rule.axis or 0], int)
            for rank in grid.ranks:
                there = grid.at(rank)
                here = "local_experts" not in rule.parameter or _expert(rule.parameter) // (
                    4 // grid.ep
                ) == there.coordinate("ep")
                stage = 0 if ".0." in rule.parameter or "embedding" in rule.parameter else grid.pp - 1
                if here and there.coordinate("pp") == stage and rule.answers(there):
                    for span in rule.held(there):
                        answered[span.hf : span.hf + span.length] += 1
            assert (answered == 1).all(), (sizes, rule.hf_name)


def _expert(parameter: str) -> int:
    words = parameter.split(".")
    return int(words[words.index("local_experts") + 1])


def test_values_of_wrong_types_are_all_listed(tmp_path: Path) -> None:
    wrong: dict[str, object] = {
        "head_dim": "128", "max_position_embeddings": 512.5, "rms_norm_eps": "small", "tie_word_embeddings": "no",
        "rope_theta": "1e6", "layer_types": "full_attention", "num_hidden_layers": True,
    }  # fmt: skip
    with pytest.raises(ConversionError) as caught:
        read_spec(_config(tmp_path, **wrong))
    lines = str(caught.value).splitlines()[1:]
    assert {line.removeprefix("  - ").split("=")[0].split(" ")[0] for line in lines} == set(wrong)
    assert "  - rms_norm_eps='small' is not a number" in lines
    assert "  - head_dim='128' is not a positive whole number" in lines


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ("yarn", "rope_scaling='yarn' is not an object"),
        ({"rope_type": "yarn", "factor": "4", "original_max_position_embeddings": 64}, "needs factor, a pos"),
        (
            {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_fast": "32"},
            "beta_fast='32', which is not a positive number",
        ),
    ],
)
def test_rope_settings_of_wrong_types(tmp_path: Path, rope: object, says: str) -> None:
    with pytest.raises(ConversionError, match=says):
        read_spec(_config(tmp_path, rope_scaling=rope))


def test_null_is_as_good_as_nothing(tmp_path: Path) -> None:
    _config(tmp_path)
    given = json.loads((tmp_path / "config.json").read_text())
    expected = read_spec(tmp_path)
    nulls = {"head_dim": None, "rms_norm_eps": None, "max_position_embeddings": None, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(given | nulls))
    assert read_spec(tmp_path) == expected


@pytest.mark.parametrize(("text", "says"), [("[]", "no JSON object"), ('{"architectures": "Qwen3"}', "no list")])
def test_a_config_of_another_form(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConversionError, match=says):
        read_spec(tmp_path)


def test_no_config_or_a_truncated_one(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="does not exist"):
        read_spec(tmp_path)
    text = _config(tmp_path).joinpath("config.json").read_text()
    (tmp_path / "config.json").write_text(text[:-9])
    with pytest.raises(ConversionError, match="not valid JSON"):
        read_spec(tmp_path)

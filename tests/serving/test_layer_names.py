"""Which layers of the checkpoint an engine has built, merged and under other names."""

import pytest

from ast_sparse.errors import UserError
from ast_sparse.serving.layer_names import LayerNames

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]


def test_a_merged_layer_has_the_parts_of_the_checkpoint_in_order() -> None:
    names = LayerNames([*reversed(ATTENTION), "model.layers.0.self_attn.o_proj"])
    assert names.parts("model.layers.0.self_attn.qkv_proj", MERGED) == ATTENTION
    assert names.parts("model.layers.0.self_attn.o_proj", MERGED) == ["model.layers.0.self_attn.o_proj"]
    names.check_all_built()


def test_the_usual_merges_are_known_if_a_model_does_not_list_them() -> None:
    names = LayerNames([*ATTENTION, "mlp.gate_proj", "mlp.up_proj"])
    assert names.parts("model.layers.0.self_attn.qkv_proj", {}) == ATTENTION
    assert names.parts("mlp.gate_up_proj", {"other": ["a"]}) == ["mlp.gate_proj", "mlp.up_proj"]
    names.check_all_built()


def test_a_layer_that_the_checkpoint_has_dense_has_no_parts() -> None:
    names = LayerNames(ATTENTION)
    assert names.parts("model.layers.0.mlp.gate_up_proj", MERGED) == []
    assert names.parts("model.layers.0.mlp.down_proj", MERGED) == []
    assert names.parts("lm_head", MERGED) == []


def test_a_layer_that_is_merged_in_the_checkpoint_itself_is_one_part() -> None:
    names = LayerNames(["model.layers.0.self_attn.qkv_proj"])
    assert names.parts("model.layers.0.self_attn.qkv_proj", {"qkv_proj": ["qkv_proj"]}) == [
        "model.layers.0.self_attn.qkv_proj"
    ]


def test_a_layer_merged_from_compressed_and_dense_parts_is_refused_by_name() -> None:
    names = LayerNames(ATTENTION[:1])
    with pytest.raises(UserError) as error:
        names.parts("model.layers.0.self_attn.qkv_proj", MERGED)
    assert str(error.value) == (
        "The engine merges `model.layers.0.self_attn.q_proj`, `model.layers.0.self_attn.k_proj` and "
        "`model.layers.0.self_attn.v_proj` into `model.layers.0.self_attn.qkv_proj`, but "
        "`model.layers.0.self_attn.q_proj` is compressed and `model.layers.0.self_attn.k_proj` is not. Export the "
        "model with --format dense."
    )


def test_a_name_that_no_layer_took_is_an_error_that_names_it_as_the_checkpoint_does() -> None:
    names = LayerNames([*ATTENTION, "model.experts.0.up", "model.experts.1.up"])
    names.rename(lambda found: [name.replace("model.", "language_model.") for name in found])
    assert names.parts("language_model.layers.0.self_attn.qkv_proj", MERGED) == ATTENTION
    with pytest.raises(UserError) as error:
        names.check_all_built()
    assert "has `model.experts.0.up` (and 1 more) compressed, but the engine builds no such layer" in str(error.value)


def test_a_name_that_the_engine_drops_counts_as_not_built() -> None:
    names = LayerNames(["vision.fc"])
    names.rename(lambda found: [])
    with pytest.raises(UserError, match=r"has `vision\.fc` compressed"):
        names.check_all_built()


def test_of_two_names_that_the_engine_makes_one_the_other_counts_as_not_built() -> None:
    names = LayerNames(["encoder.fc", "decoder.fc"])
    names.rename(lambda found: ["shared.fc"])
    assert names.parts("shared.fc", {}) == ["decoder.fc"]
    with pytest.raises(UserError, match=r"has `encoder\.fc` compressed"):
        names.check_all_built()

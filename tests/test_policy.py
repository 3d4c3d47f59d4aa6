"""Rules: which tensor gets which grid and scale, the table that shows it, and the errors that name the remedy."""

import re
from typing import Any

import jax.numpy as jnp
import pytest

from research.errors import UserError
from research.quant import Leaf, Policy, Rule
from research.quant.policy import Coverage, coverage, shapes_by_path
from research.quant.rules import check_effect

LEAVES = {
    "embed/table_vd": Leaf("vd", "d", (97, 64), (4, 1)),
    "layers/attention/q_dnh": Leaf("ldnh", "d", (3, 64, 9, 8), (1, 1, 4, 1)),
    "layers/attention/o_nhd": Leaf("lnhd", "nh", (3, 9, 8, 64), (1, 4, 1, 1)),
    "layers/norm/scale_d": Leaf("ld", "", (3, 64), (1, 1)),
    "norm/scale_d": Leaf("d", "", (64,), (1,)),
}
SHAPES = {  # vocabulary and heads are padded for four ways
    "embed/table_vd": (100, 64),
    "layers/attention/q_dnh": (3, 64, 12, 8),
    "layers/attention/o_nhd": (3, 12, 8, 64),
    "layers/norm/scale_d": (3, 64),
    "norm/scale_d": (64,),
}


def int8(match: str = ".*", **changes: Any) -> Rule:
    return Rule(**{"match": match, "weight": "int8"} | changes)


def test_groups_of_activations_divide_the_axis_and_go_with_those_of_the_weight() -> None:
    leaves = {"w": Leaf("io", "i", (48, 7), (2, 1))}

    def formats(**rule: str) -> dict:
        return Policy((Rule(match="w", **rule),), leaves).formats({"w": (48, 7)})

    assert formats(weight="int8", activation="int8:group:8")["w"].scale_shape == (1, 7)
    assert formats(weight="int8", activation="int8:group:8", granularity="group:8")["w"].scale_shape == (6, 7)
    for weight in ("int8", "fp32"):
        with pytest.raises(
            UserError, match=r"^w: activation='int8:group:16'.*shard 'i' of 24.* 2, 3, 4, 6, 8, 12, 24$"
        ):
            formats(weight=weight, activation="int8:group:16")
    with pytest.raises(UserError, match="'int8:group:8' with granularity='group:4'; give both groups one size"):
        formats(weight="int8", activation="int8:group:8", granularity="group:4")
    with pytest.raises(UserError, match="activation='int8:group:0' is no grid of activations"):
        formats(weight="int8", activation="int8:group:0")


def test_static_scales_are_one_for_each_stacked_tensor() -> None:
    rules = (int8("embed/.*", activation="int8:static:99.9"), Rule(match=".*", weight="bf16", activation="int8"))
    formats = Policy((int8("layers/.*q_dnh", activation="int8:static:ema"), *rules), LEAVES).formats(SHAPES)
    assert {path: form.input_scale_shape for path, form in formats.items()} == {
        "embed/table_vd": (1, 1),
        "layers/attention/q_dnh": (3, 1, 1, 1),
        "layers/attention/o_nhd": None,
    }


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"activation": "int8:static:100.5"}, "'int8:static:100.5'; give a percentile above 0, up to 100$"),
        ({"activation": "int8:static:0"}, "'int8:static:0'; give a percentile above 0, up to 100$"),
        ({"activation": "int8:static:emma"}, "is no grid of activations; did you mean 'int8:static:ema'"),
        ({"activation": "int8:static:ema", "weight": "fp32"}, "and weight='fp32' has none; take a grid from the start"),
        ({"activation": "int8:static:99", "end_step": 3}, "and end_step=3 has none; take a grid from the start"),
    ],
)
def test_static_scales_that_cannot_be(rule: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Policy((Rule(**{"match": ".*", "weight": "int8"} | rule),))


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("tensor", [(1, 1), (3, 1, 1, 1), (3, 1, 1, 1)]),
        ("channel", [(100, 1), (3, 1, 12, 8), (3, 1, 1, 64)]),
        ("group:8", [(100, 8), (3, 8, 12, 8), (3, 12, 1, 64)]),
    ],
)
def test_scales_follow_the_axes_of_the_product(granularity: str, expected: list[tuple[int, ...]]) -> None:
    formats = Policy((int8(granularity=granularity),), LEAVES).formats(SHAPES)
    assert [form.scale_shape for form in formats.values()] == expected
    assert {form.grid.name for form in formats.values()} == {"int8"}


def test_experts_and_layers_never_share_a_scale() -> None:
    shape = (3, 4, 64, 96)
    leaves = {"up": Leaf("ledf", "d", shape, (1, 4, 1, 1))}
    wanted = {"tensor": (3, 4, 1, 1), "channel": (3, 4, 1, 96), "group:32": (3, 4, 2, 96)}
    for granularity, expected in wanted.items():
        form = Policy((int8(granularity=granularity),), leaves).formats({"up": shape})["up"]
        assert form.scale_shape == expected
        assert form.elements == {"tensor": 64 * 96, "channel": 64, "group:32": 32}[granularity]


def test_vectors_and_scalars_stay_float_whatever_matches_them() -> None:
    formats = Policy((int8(),), LEAVES).formats(SHAPES)
    assert list(formats) == ["embed/table_vd", "layers/attention/q_dnh", "layers/attention/o_nhd"]
    foreign = Policy((int8(axes="io", contract="i"),)).formats({"kernel": (5, 7), "bias": (7,), "gain": ()})
    assert list(foreign) == ["kernel"]


def test_the_first_rule_that_matches_the_whole_path_wins() -> None:
    rules = (
        Rule(match="embed/.*", weight="bf16"),
        Rule(match=".*o_nhd", weight="fp32"),
        int8("layers/.*", granularity="tensor", activation="int8"),
        Rule(match="norm/.*"),
    )
    policy = Policy(rules, LEAVES)
    formats = policy.formats(SHAPES)
    assert {path: (form.grid.name, form.rule) for path, form in formats.items()} == {
        "embed/table_vd": ("bf16", rules[0]),
        "layers/attention/q_dnh": ("int8", rules[2]),
    }
    assert [policy.activation(path) for path in ("layers/attention/q_dnh", "embed/table_vd", "none")] == [
        "int8",
        "none",
        "none",
    ]
    assert Policy((int8("embed"),)).rule("embed/table_vd") is None


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((int8("embed/tabel_vd"),), "match='embed/tabel_vd' is the first match of no parameter.*'embed/table_vd'"),
        ((int8(), int8("norm/.*")), "match='norm/.*' is the first match of no parameter"),
        ((int8("table_vd"),), "match='table_vd' is the first match of no parameter.*'embed/table_vd'"),
        ((int8(), int8()), "match='.*' is the first match of no parameter"),
        ((int8(granularity="group:64"),), r"q?.*'group:64'.*axis 'h' of 8; valid group sizes: 2, 4, 8$"),
        ((int8(axes="io", contract="i"),), r"axes='io', contract='i' don't name the 4 axes of .*\[3, 64, 12, 8\]"),
        ((int8(axes="ldkh", contract="n"),), "contract='n' don't name"),
    ],
)
def test_rules_that_do_not_fit_the_model_are_errors(rules: tuple[Rule, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Policy(rules, LEAVES).formats(SHAPES)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(match="a", weight="int88"), "weight='int88' is no grid.*'int8'"),
        (Rule(match="a", activation="int4"), "activation='int4' is no grid of activations.*'int8'"),
        (int8(granularity="chanel"), "granularity='chanel'; give tensor, channel or group:32"),
        (int8(granularity="group:0"), "granularity='group:0'"),
        (int8(granularity="group:32x"), "granularity='group:32x'"),
        (Rule(match="a", weight="q4_1"), "q4_1 with granularity='channel', .*wants granularity='group:32'"),
        (
            Rule(match="a", weight="q4_1", granularity="group:32", earlier=("int8:9",)),
            "q4_1 with .*earlier=.*no other grid before",
        ),
        (
            int8(backward="int8"),
            "backward='int8' with weight='int8', .*activation='none', .*activation='int8', end_step=0",
        ),
        (int8(backward="int8", activation="int8:group:32"), "backward='int8' with .*it wants integers from the start"),
        (int8(backward="int8", activation="int8", granularity="tensor"), "backward='int8' with .*granularity='tensor'"),
        (int8(backward="int8", activation="int8", end_step=9), "backward='int8' with .*end_step=9"),
        (Rule(match="a", weight="fp16", activation="int8", backward="int8"), "backward='int8' with weight='fp16'"),
        (int8(axes="io"), "axes='io', contract=''; give both or neither"),
        (int8(learn_scale=True, earlier=("q4_0:5",)), "learn_scale=True, but q4_0 has no scale that is positive"),
        (int8(contract="i"), "axes='', contract='i'; give both or neither"),
    ],
)
def test_rules_that_are_impossible_are_errors(rule: Rule, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Policy((rule,))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(match="a", weight="bf16", scale="pow2"), "scale='pow2' would have no effect: bf16 has no scale"),
        (Rule(match="a", weight="fp16", granularity="tensor"), "granularity='tensor' would have no effect"),
        (Rule(match="a", estimator="clipped"), "estimator='clipped' would have no effect: fp32 is no grid"),
        (Rule(match="a", end_step=5), "end_step=5 would have no effect"),
        (int8(begin_step=2, end_step=5), "begin_step=2 would have no effect: anneal='none'"),
        (int8(oscillation_momentum=0.1), "oscillation_momentum=0.1 would have no effect: nothing is counted"),
        (int8(oscillation_momentum=0.0, freeze_above=0.1), "freeze_above=0.1 would have no effect"),
    ],
)
def test_fields_that_say_nothing_are_errors_of_a_config(rule: Rule, message: str) -> None:
    Policy((rule,))  # another model's code may make rules for all kinds of tensors
    with pytest.raises(UserError, match=message):
        check_effect(rule)


@pytest.mark.parametrize(
    ("leaf", "shape", "place"),
    [
        (Leaf("io", "i", (80, 7), (1, 1)), (80, 7), "axis 'i' of 80"),
        (Leaf("io", "i", (192, 7), (4, 1)), (192, 7), "shard 'i' of 48"),  # 192 is a multiple of 32, a quarter is not
        (Leaf("io", "i", (48, 7), (2, 1)), (64, 7), "axis 'i' of 48"),  # so is 64, but a group would straddle padding
        (Leaf("io", "i", (64, 7), (1, 2)), (64, 7), ""),
        (Leaf("io", "i", (63, 7), (1, 1)), (63, 7), "axis 'i' of 63"),
    ],
    ids=["axis", "shard", "padding", "fits", "odd"],
)
def test_groups_that_mix_shards_or_padding_name_the_valid_sizes(leaf: Leaf, shape: tuple[int, int], place: str) -> None:
    def formats(group: int) -> dict:
        return Policy((int8(granularity=f"group:{group}"),), {"w": leaf}).formats({"w": shape})

    if not place:
        assert formats(32)["w"].scale_shape == (2, 7)
        return
    with pytest.raises(UserError, match=f"^w: granularity='group:32' doesn't divide the {place}; ") as error:
        formats(32)
    named = [int(size) for size in re.findall(r"\d+", str(error.value).split("valid group sizes: ")[1])]
    assert named
    for size in range(2, 80):
        if size in named:
            formats(size)
        else:
            with pytest.raises(UserError):
                formats(size)


def test_a_prime_axis_has_no_valid_size_but_itself() -> None:
    policy = Policy((int8(granularity="group:32"),), {"w": Leaf("io", "i", (61, 7), (1, 1))})
    with pytest.raises(UserError, match="valid group sizes: 61$"):
        policy.formats({"w": (61, 7)})
    split = Policy((int8(granularity="group:32"),), {"w": Leaf("io", "i", (62, 7), (31, 1))})
    with pytest.raises(UserError, match="axis 'i' of 62; valid group sizes: 2$"):
        split.formats({"w": (62, 7)})


def test_models_that_do_not_tell_their_axes_are_asked_for_them() -> None:
    with pytest.raises(UserError, match=r"^kernel \[5, 7\] doesn't tell its axes.*Rule\(axes='io', contract='i'\)"):
        Policy((int8(),)).formats({"kernel": (5, 7)})
    assert list(Policy((Rule(match=".*", weight="bf16"),)).formats({"kernel": (5, 7)})) == ["kernel"]


def test_coverage_names_every_parameter_its_rule_and_its_bytes() -> None:
    params = {
        "a": {"w_io": jnp.zeros((64, 5)), "b_o": jnp.zeros(5)},
        "c_io": jnp.zeros((6, 5)),
        "d_io": jnp.zeros((3, 2)),
    }
    rules = (
        int8("a/.*", granularity="group:32", activation="int8", axes="io", contract="i"),
        Rule(match="c_io", weight="fp32", activation="int8"),
    )
    assert coverage(Policy(rules), params) == [
        Coverage("a/b_o", (5,), "fp32", "", "none", "a/.* (kept float)", 20),
        Coverage("a/w_io", (64, 5), "int8", "group:32", "int8", "a/.*", 320 + 2 * 10),
        Coverage("c_io", (6, 5), "fp32", "", "int8", "c_io (kept float)", 120),
        Coverage("d_io", (3, 2), "fp32", "", "none", "no rule", 24),
    ]
    assert list(shapes_by_path(params).values()) == [(5,), (64, 5), (6, 5), (3, 2)]
    half = coverage(Policy((Rule(match=".*", weight="fp16"),)), {"w_io": jnp.zeros((6, 5))})
    assert half == [Coverage("w_io", (6, 5), "fp16", "", "none", ".*", 60)]

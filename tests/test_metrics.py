"""The loss is that of the full logits, which never exist."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training as tiny
from flax import nnx

from research.architecture import Architecture
from research.config import MeshConfig, TrainConfig
from research.mesh import make_mesh
from research.model.attention import mutual
from research.model.placement import place_float
from research.setup import Setup, make_setup, put_batch, segments_of
from research.tasks.batches import Batch, training_batches, window_rows
from research.train.metrics import answer_nll, answers_against_teacher, distillation_sums, loss_sums, token_nll

SLOTS = 5  # answers per row; 8 rows
CHUNKS = (8, 16, 10_000)  # answer positions: 1, 2 and all 5 of each row; the test of the gradient has 3


def batch() -> Batch:
    """Rows whose five slots point at positions in any order, some of them twice, and some slots unused."""
    rng = np.random.default_rng(3)
    rows = tiny.batch(3)
    shape = (tiny.ROWS, SLOTS)
    source_ba = rng.integers(0, tiny.LENGTH, shape).astype(np.int32)
    target_ba = rng.integers(0, tiny.ARCHITECTURE.vocabulary, shape).astype(np.int32)
    return rows._replace(source_ba=source_ba, target_ba=target_ba, answer_ba=rng.integers(0, 2, shape).astype(np.int32))


def float_setup(tensor: int) -> tuple[Setup, Any]:
    """A float model and its weights on so many devices."""
    setup = make_setup(tiny.ARCHITECTURE, (), tiny.TRAIN, make_mesh(MeshConfig(tensor=tensor)))
    return setup, place_float(tiny.foundation().__getitem__, setup.table, setup.mesh)


def plain_logits(setup: Setup, weights: Any, batch: Batch) -> jax.Array:
    """All logits at the answers, [b, a, v], of the vocabulary without its padding."""
    model = nnx.merge(setup.graph, weights)
    hidden_btd, _ = model(batch.tokens_bt, batch.position_bt, mutual(segments_of(batch)))
    logits_btv = model.embed.logits(hidden_btd)[:, :, : tiny.ARCHITECTURE.vocabulary]
    return jnp.take_along_axis(logits_btv, batch.source_ba[:, :, None], axis=1)


def plain_nll(setup: Setup, weights: Any, batch: Batch) -> jax.Array:
    """The same from the logits of all positions and the whole vocabulary, less its padding, at once."""
    logp_bav = jax.nn.log_softmax(plain_logits(setup, weights, batch))
    picked_ba = jnp.take_along_axis(logp_bav, batch.target_ba[:, :, None], axis=2)[:, :, 0]
    return jnp.where(batch.answer_ba > 0, -picked_ba, 0)


@pytest.mark.parametrize("tensor", (1, pytest.param(4, marks=pytest.mark.slow)))
def test_loss_and_gradient_are_those_of_the_full_logits(tensor: int) -> None:
    setup, weights = float_setup(tensor)
    used_ba = batch().answer_ba > 0
    with jax.set_mesh(setup.mesh):
        rows = put_batch(batch(), setup.mesh)

        def plain_sum(weights: Any) -> tuple[jax.Array, jax.Array]:
            nll_ba = plain_nll(setup, weights, rows)
            return nll_ba.sum(), nll_ba

        (_, plain_ba), wanted = jax.jit(jax.value_and_grad(plain_sum, has_aux=True))(weights)
        assert (np.asarray(plain_ba)[used_ba] > 0).all()

        def sums(weights: Any) -> tuple[jax.Array, jax.Array]:
            loss, found = loss_sums(setup.graph, weights, rows, 24)
            return loss, found.tokens

        (total, count), gradient = jax.jit(jax.value_and_grad(sums, has_aux=True))(weights)
        assert float(count) == used_ba.sum() and float(total) == pytest.approx(np.asarray(plain_ba).sum(), rel=1e-5)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=2e-5), gradient, wanted)
        for chunk in CHUNKS if tensor == 1 else ():
            nll_ba = jax.jit(lambda w, chunk=chunk: answer_nll(setup.graph, w, rows, chunk))(weights)
            np.testing.assert_allclose(nll_ba, plain_ba, rtol=1e-5, atol=1e-6, err_msg=f"chunk {chunk}")


@pytest.mark.parametrize("tensor", (1, pytest.param(4, marks=pytest.mark.slow)))
@pytest.mark.optimized
def test_divergence_from_a_teacher_and_its_gradient_are_those_of_the_full_logits(tensor: int) -> None:
    setup, teacher = float_setup(tensor)
    rng = np.random.default_rng(8)
    student = jax.tree.map(lambda w: w * jnp.asarray(1 + 0.1 * rng.normal(size=w.shape), jnp.float32), teacher)
    used_ba = batch().answer_ba > 0
    with jax.set_mesh(setup.mesh):
        rows = put_batch(batch(), setup.mesh)

        def plain_sum(weights: Any) -> tuple[jax.Array, Any]:
            logits_bav, teacher_bav = (plain_logits(setup, w, rows) for w in (weights, teacher))
            agree_ba = logits_bav.argmax(-1) == teacher_bav.argmax(-1)
            p_bav = jax.nn.softmax(teacher_bav)
            cross_ba = -(p_bav * jax.nn.log_softmax(logits_bav)).sum(-1)
            kl_ba = jnp.where(used_ba, cross_ba + (p_bav * jnp.log(p_bav)).sum(-1), 0)
            return kl_ba.sum(), (kl_ba, agree_ba & used_ba)

        def ours(weights: Any) -> jax.Array:
            return distillation_sums(setup.graph, weights, setup.graph, teacher, 1.0, rows, 24)[0]

        (total, (kl_ba, agree_ba)), wanted = jax.jit(jax.value_and_grad(plain_sum, has_aux=True))(student)
        assert float(total) > 0.1 and agree_ba.any() and not agree_ba[used_ba].all()
        found, gradient = jax.jit(jax.value_and_grad(ours))(student)
        assert float(found) == pytest.approx(float(total), rel=1e-4)  # differences of logarithms of some nats
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=2e-5), gradient, wanted)

        @jax.jit
        def against(weights: Any) -> Any:
            return answers_against_teacher(setup.graph, weights, setup.graph, teacher, rows, 16)

        np.testing.assert_allclose(against(student).divergence_ba, kl_ba, rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(against(student).agrees_ba, agree_ba)
        # A model from itself: nothing, but for what float32 loses in logits of some nats.
        np.testing.assert_allclose(against(teacher).divergence_ba, 0, atol=2e-6)
        np.testing.assert_array_equal(against(teacher).agrees_ba, used_ba)


def test_the_padded_vocabulary_gets_no_probability() -> None:
    """67 words are padded to 68 on four devices; the probabilities of the 67 alone sum to 1."""
    words = tiny.ARCHITECTURE.vocabulary
    setup, weights = float_setup(4)
    assert setup.table["embed/table_vd"].shape[0] > words
    target_ba = np.tile(np.arange(words, dtype=np.int32), (tiny.ROWS, 1))
    every_word = tiny.batch()._replace(
        target_ba=target_ba, source_ba=np.full_like(target_ba, tiny.LENGTH - 1), answer_ba=np.ones_like(target_ba)
    )
    with jax.set_mesh(setup.mesh):
        nll = jax.jit(lambda w, rows: answer_nll(setup.graph, w, rows, 256))
        nll_ba = np.asarray(nll(weights, put_batch(every_word, setup.mesh)), np.float64)
    np.testing.assert_allclose(np.exp(-nll_ba).sum(axis=1), 1, rtol=1e-5)


def test_a_logit_of_minus_infinity_is_no_trouble() -> None:
    logits_bav = jnp.array([[[1.0, 2.0, -jnp.inf]]])
    nll, gradient = jax.value_and_grad(lambda x: token_nll(x, jnp.array([[1]])).sum())(logits_bav)
    assert float(nll) == pytest.approx(np.log1p(np.exp(-1.0)), rel=1e-6)
    assert np.isfinite(gradient).all() and gradient[0, 0, 2] == 0


LARGE = Architecture(
    vocabulary=50_021, width=8, layers=1, query_heads=2, kv_heads=2, head_width=4, feed_forward=12, context=32
)


def test_full_logits_never_exist() -> None:
    """The largest array over the vocabulary in the compiled gradient is one chunk of logits, a quarter a device."""
    b, t, a, per_row = 4, 10, 6, 2
    mesh = make_mesh(MeshConfig(tensor=4))
    setup = make_setup(LARGE, (), tiny.TRAIN, mesh)
    shards, padded = 4, setup.table["embed/table_vd"].shape[0]
    shapes = {path: parameter.shape for path, parameter in setup.table.items()}
    weights = place_float(lambda path: np.zeros(setup.table[path].padding.logical, np.float32), setup.table, mesh)
    tokens_bt, slots_ba = np.zeros((b, t), np.int32), np.zeros((b, a), np.int32)
    rows = Batch(tokens_bt, tokens_bt, tokens_bt, tokens_bt, slots_ba, slots_ba, slots_ba + 1)
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(lambda w: loss_sums(setup.graph, w, rows, b * per_row)[0]))
        text = program.lower(weights).compile().as_text()
    arrays = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b(?:f32|bf16|pred|s32)\[([\d,]+)\]", text)}
    over_vocabulary = {shape for shape in arrays if padded in shape or padded // shards in shape}
    table = {(padded // shards, LARGE.width), (LARGE.width, padded // shards)}
    assert any(set(shape) == set(shapes["embed/table_vd"][1:]) | {padded // shards} for shape in over_vocabulary)
    for shape in over_vocabulary - table:
        assert padded not in shape, f"{shape} spans the whole vocabulary on one device"
        assert np.prod(shape) <= b * per_row * padded // shards, f"{shape} is more than the logits of one chunk"
    assert any(np.prod(shape) == b * per_row * padded // shards for shape in over_vocabulary - table)


def test_packed_rows_have_the_loss_and_the_gradient_of_the_rows_they_were() -> None:
    rng = np.random.default_rng(0)
    windows = [rng.integers(0, tiny.ARCHITECTURE.vocabulary, size).astype(np.int32) for size in (12, 5, 4, 3, 7, 2)]
    setup, weights = float_setup(1)
    found = {}
    for pack in (False, True):
        budget = TrainConfig(steps=1, batch_size=len(windows), accumulate=1, pack=pack)
        ((rows,),) = training_batches(window_rows(windows, tiny.LENGTH), budget)

        def sums(weights: Any, rows: Batch = rows) -> tuple[jax.Array, jax.Array]:
            loss, found = loss_sums(setup.graph, weights, rows, 24)
            return loss, found.tokens

        with jax.set_mesh(setup.mesh):
            found[pack] = len(rows.tokens_bt), *jax.jit(jax.value_and_grad(sums, has_aux=True))(weights)
    (rows, (loss, tokens), gradient), (packed_rows, (packed_loss, packed_tokens), packed_gradient) = found.values()
    assert (rows, packed_rows) == (6, 3) and tokens == packed_tokens == sum(map(len, windows)) - 6
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-6)
    # Sums over other rows, in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), packed_gradient, gradient)

"""Batches: the layout that lets one forward score all labels, and an order that is a function of (seed, step)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import grain
import numpy as np
import pytest

from research.config import TrainConfig
from research.errors import UserError
from research.tasks.batches import (
    Batch,
    bucket,
    gather_examples,
    label_rows,
    label_sums,
    padding_share,
    scoring_batches,
    text_batches,
    training_batches,
    window_rows,
)
from research.tasks.encoding import EncodedExamples

END = 2
LENGTHS = (12, 16, 24)
ANSWERS = ((31, END), (41, 42, END), (51, 52, 53, END))


def make_examples(count: int, answers: Sequence[Sequence[int]] = ANSWERS) -> EncodedExamples:
    """Return examples whose prompts, of 4 to 15 tokens, begin with 1000 + their number."""
    generator = np.random.default_rng(7)
    sizes = generator.integers(3, 15, count)
    prompts = [np.array([1000 + i, *generator.integers(100, 200, size)], np.int32) for i, size in enumerate(sizes)]
    return EncodedExamples(
        prompts=tuple(prompts),
        gold_e=generator.integers(len(answers), size=count).astype(np.int32),
        answers=tuple(np.array(answer, np.int32) for answer in answers),
        cut=0,
    )


def attention_mask_bts(batch: Batch) -> np.ndarray:
    """Return which query t sees which key s, bool, [b, t, s]: the rule of the module's docstring, cell by cell."""
    rows, length = batch.branch_bt.shape
    mask_bts = np.zeros((rows, length, length), bool)
    for b, t, s in np.ndindex(mask_bts.shape):
        key, query = batch.branch_bt[b, s], batch.branch_bt[b, t]
        mask_bts[b, t, s] = s <= t and key in (0, query) and key != -1
    return mask_bts


def seen(batch: Batch, mask_bts: np.ndarray, row: int, query: int) -> list[tuple[int, int]]:
    """Return (position, token) of each key that a query sees, in the order of the row."""
    keys = np.flatnonzero(mask_bts[row, query])
    return [(int(batch.position_bt[row, key]), int(batch.tokens_bt[row, key])) for key in keys]


def predictions(batch: Batch, row: int, branch: int) -> list[tuple[list[tuple[int, int]], int]]:
    """Return, for each slot of an answer, what its predictor sees and which token it is to predict."""
    mask_bts = attention_mask_bts(batch)
    slots = np.flatnonzero(batch.answer_ba[row] == branch)
    return [(seen(batch, mask_bts, row, batch.source_ba[row, a]), int(batch.target_ba[row, a])) for a in slots]


def alone(prompt: Sequence[int], answer: Sequence[int]) -> list[tuple[list[tuple[int, int]], int]]:
    """Return what `predictions` must be: prompt and answer as a plain causal sequence, with nothing beside."""
    whole = [int(token) for token in (*prompt, *answer)]
    return [(list(enumerate(whole[:end])), whole[end]) for end in range(len(prompt), len(whole))]


def used_numbers(batch: Batch) -> list[int]:
    """Return the numbers of the examples in a batch's rows that are not empty."""
    return [int(row[0]) - 1000 for row, used in zip(batch.tokens_bt, batch.answer_ba.any(1), strict=True) if used]


def assert_equal_batches(one: Batch, other: Batch) -> None:
    for name, a, b in zip(Batch._fields, one, other, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def batches_of(examples: EncodedExamples, *, accumulate: int = 1, **budget: int) -> grain.MapDataset[tuple[Batch, ...]]:
    """Return the training batches of a budget."""
    train = TrainConfig(accumulate=accumulate, **budget)
    rows = label_rows(examples, LENGTHS)
    return training_batches(rows, train)


def whole_batches(*arguments: Any, **settings: Any) -> grain.MapDataset[Batch]:
    """Return the training batches of steps that are not split into micro-batches."""
    return batches_of(*arguments, **settings).map(lambda parts: parts[0])


# --- layout ---


def test_every_label_is_scored_as_if_it_stood_alone_behind_the_prompt() -> None:
    examples = make_examples(5)
    for scoring in scoring_batches(examples, LENGTHS, batch_size=2):
        for row, number in enumerate(scoring.example_b):
            for label, answer in enumerate(ANSWERS):
                expected = alone(examples.prompts[number], answer) if number >= 0 else []
                assert predictions(scoring.batch, row, label + 1) == expected


def test_a_training_row_holds_the_true_label_and_nothing_else() -> None:
    examples = make_examples(9)
    dataset = whole_batches(examples, seed=0, steps=3, batch_size=3)
    for batch in dataset:
        for row, number in enumerate(used_numbers(batch)):
            answer = ANSWERS[examples.gold_e[number]]
            assert predictions(batch, row, 1) == alone(examples.prompts[number], answer)
            assert set(batch.answer_ba[row]) <= {0, 1} and set(batch.branch_bt[row]) <= {-1, 0, 1}
            assert (batch.branch_bt[row] >= 0).sum() == len(examples.prompts[number]) + len(answer) - 1


def packed_batches(examples: EncodedExamples, multiple: int = 1, **budget: int) -> list[tuple[Batch, ...]]:
    return list(training_batches(label_rows(examples, LENGTHS), TrainConfig(pack=True, **budget), multiple))


def test_packed_examples_are_predicted_as_if_each_stood_alone() -> None:
    examples = make_examples(40)
    steps = packed_batches(examples, seed=0, steps=3, batch_size=12, accumulate=2)
    shared = 0
    for step, parts in enumerate(steps):
        plain = sorted(used_numbers(whole_batches(examples, seed=0, steps=3, batch_size=12)[step]))
        found = []
        for batch in parts:
            for row in range(len(batch.tokens_bt)):
                branches = sorted(set(batch.answer_ba[row]) - {0})
                shared += len(branches) > 1
                for branch in branches:
                    number = int(batch.tokens_bt[row, batch.branch_bt[row] == branch][0]) - 1000
                    answer = ANSWERS[examples.gold_e[number]]
                    assert predictions(batch, row, branch) == alone(examples.prompts[number], answer)
                    found.append(number)
        assert sorted(found) == plain  # each of the step's examples, once
    assert shared > 3


def test_packed_rows_are_few_full_and_a_multiple() -> None:
    examples = make_examples(100)
    steps = packed_batches(examples, multiple=4, seed=0, steps=20, batch_size=16, accumulate=2)
    shapes = {(batch.tokens_bt.shape, batch.source_ba.shape) for parts in steps for batch in parts}
    assert {rows % 4 for (rows, _), _ in shapes} == {0} and len(shapes) <= 2
    full = packed_batches(examples, seed=0, steps=20, batch_size=16, accumulate=1)
    plain = [batch for batch in whole_batches(examples, seed=0, steps=20, batch_size=16)]
    assert padding_share(batch for (batch,) in full) < padding_share(plain) / 2


def test_windows_are_packed_too() -> None:
    windows = [np.arange(100 * i, 100 * i + size, dtype=np.int32) for i, size in enumerate((8, 3, 5, 2))]
    ((batch,),) = training_batches(window_rows(windows, 8), TrainConfig(pack=True, steps=1, batch_size=4, accumulate=1))
    assert batch.tokens_bt.shape == (3, 8)
    found = [predictions(batch, row, branch) for row in range(3) for branch in sorted(set(batch.answer_ba[row]) - {0})]
    for window in windows:
        assert alone(window[:1], window[1:]) in found


def test_arrays_are_int32_and_their_sizes_are_few() -> None:
    examples = make_examples(100)
    training = list(whole_batches(examples, seed=0, steps=40, batch_size=4))
    scoring = [scored.batch for scored in scoring_batches(examples, LENGTHS, batch_size=8)]
    for batches, size, slots in ((training, 4, 4), (scoring, 8, 2 + 3 + 4)):
        assert {array.dtype for batch in batches for array in batch} == {np.dtype(np.int32)}
        shapes = {(batch.tokens_bt.shape, batch.source_ba.shape) for batch in batches}
        assert shapes == {((size, length), (size, slots)) for length in LENGTHS}
        for batch in batches:
            assert batch.tokens_bt.shape == batch.position_bt.shape == batch.branch_bt.shape
            assert batch.source_ba.shape == batch.target_ba.shape == batch.answer_ba.shape


def test_unused_places_are_zero_and_no_query_is_without_a_key() -> None:
    examples = make_examples(5)
    batches = [scored.batch for scored in scoring_batches(examples, LENGTHS, batch_size=4)]
    batches += list(text_batches(range(3, 28), window=10, batch_size=2))
    assert any(not used for batch in batches for used in batch.answer_ba.any(1)), "the case of an empty row is missing"
    for batch in batches:
        padding, unused = batch.branch_bt == -1, batch.answer_ba == 0
        assert not batch.tokens_bt[padding].any() and not batch.position_bt[padding].any()
        assert not batch.source_ba[unused].any() and not batch.target_ba[unused].any()
        assert attention_mask_bts(batch).any(axis=2).all()


# --- training order ---


def test_every_epoch_uses_each_example_once_in_another_order() -> None:
    examples = make_examples(4 * 150)
    per_epoch = 150
    dataset = whole_batches(examples, seed=3, steps=2 * per_epoch, batch_size=4)
    epochs = [[used_numbers(dataset[step]) for step in range(start, start + per_epoch)] for start in (0, per_epoch)]
    for epoch in epochs:
        assert sorted(number for batch in epoch for number in batch) == list(range(600))
    assert epochs[0] != epochs[1]
    assert {frozenset(batch) for batch in epochs[0]} != {frozenset(batch) for batch in epochs[1]}


def test_an_epoch_leaves_out_what_fills_no_batch_and_never_the_same() -> None:
    examples = make_examples(11)
    dataset = whole_batches(examples, seed=0, steps=20, batch_size=4)
    left_out = []
    for epoch in range(10):
        numbers = used_numbers(dataset[2 * epoch]) + used_numbers(dataset[2 * epoch + 1])
        assert len(set(numbers)) == 8
        left_out.append(frozenset(range(11)) - set(numbers))
    assert len(set(left_out)) > 5


def test_a_step_does_not_depend_on_what_was_read_before_nor_on_the_number_of_steps() -> None:
    examples = make_examples(300)
    forward = list(whole_batches(examples, seed=5, steps=200, batch_size=4))
    fresh = whole_batches(examples, seed=5, steps=500, batch_size=4)
    for step in (199, 0, 74, 75, 76, 150):
        assert_equal_batches(fresh[step], forward[step])


def test_a_slice_continues_where_it_begins_also_in_background_threads() -> None:
    examples = make_examples(60)
    dataset = whole_batches(examples, seed=5, steps=40, batch_size=4)
    options = grain.ReadOptions(num_threads=3, prefetch_buffer_size=8)
    later = list(dataset[13:].to_iter_dataset(options))
    assert len(later) == 27
    for step, batch in enumerate(later, start=13):
        assert_equal_batches(batch, dataset[step])


def test_the_seed_decides_the_order() -> None:
    examples = make_examples(60)
    orders = [
        [used_numbers(batch) for batch in whole_batches(examples, seed=seed, steps=15, batch_size=4)]
        for seed in (0, 0, 1, 2**32 - 1)
    ]
    assert orders[0] == orders[1]
    assert len({str(order) for order in orders}) == 3
    # Not only the order of batches, but also which examples meet.
    assert len({str(sorted(map(sorted, order))) for order in orders}) == 3


def test_batches_that_do_not_fit_are_the_users_mistake() -> None:
    examples = make_examples(7)
    with pytest.raises(UserError, match="train.batch_size=8 is larger than the training split of 7 examples"):
        batches_of(examples, seed=0, steps=1, batch_size=8)


def test_micro_batches_are_the_rows_of_the_step_by_length() -> None:
    examples = make_examples(300)
    whole = whole_batches(examples, seed=2, steps=30, batch_size=12)
    split = batches_of(examples, seed=2, steps=30, batch_size=12, accumulate=3)
    for step in range(30):
        parts = split[step]
        assert [len(part.tokens_bt) for part in parts] == [4, 4, 4]
        assert [n for part in parts for n in used_numbers(part)] == used_numbers(whole[step])
        sizes = [int(size) for part in parts for size in (part.branch_bt >= 0).sum(1)]
        assert sizes == sorted(sizes)
        for part in parts:
            assert part.tokens_bt.shape[1] == bucket(int((part.branch_bt >= 0).sum(1).max()), LENGTHS)


def test_micro_batches_save_padding() -> None:
    examples = make_examples(300)
    shares = [
        padding_share(part for parts in dataset for part in parts)
        for dataset in (batches_of(examples, seed=2, steps=30, batch_size=12, accumulate=parts) for parts in (1, 3, 12))
    ]
    assert shares[0] > shares[1] > shares[2]


def test_a_step_is_a_fair_sample_where_label_and_length_go_together() -> None:
    """Sorting by length across steps would give most steps one label only."""
    prompts = tuple(np.full(3 + 9 * (number % 2), 1000 + number, np.int32) for number in range(400))
    examples = replace(make_examples(400), prompts=prompts, gold_e=np.arange(400, dtype=np.int32) % 2)
    steps = batches_of(examples, seed=0, steps=40, batch_size=8, accumulate=4)
    mixed = [len({number % 2 for part in parts for number in used_numbers(part)}) == 2 for parts in steps]
    assert sum(mixed) >= 38  # a fair coin gives eight equal rows once in 128


# --- scoring order ---


def test_scoring_covers_each_example_once_and_finds_back() -> None:
    examples = make_examples(21)
    scored = list(scoring_batches(examples, LENGTHS, batch_size=4))
    counts = Counter(number for scoring in scored for number in used_numbers(scoring.batch))
    assert counts == Counter(range(21))
    for scoring in scored:
        real = scoring.example_b[scoring.example_b >= 0]
        assert used_numbers(scoring.batch) == list(real)
        assert list(scoring.batch.answer_ba.any(1)) == list(scoring.example_b >= 0)
    pairs = [(scoring, scoring.batch.tokens_bt[:, 0]) for scoring in scored]
    np.testing.assert_array_equal(gather_examples(pairs, 21), 1000 + np.arange(21))
    with pytest.raises(ValueError, match="each of 21 examples exactly once"):
        gather_examples(pairs[1:], 21)
    with pytest.raises(ValueError, match="each of 21 examples exactly once"):
        gather_examples([*pairs, pairs[0]], 21)


def test_label_sums_take_each_answer_and_ignores_unused_slots() -> None:
    (scoring,) = scoring_batches(make_examples(2), LENGTHS, batch_size=3)
    batch = scoring.batch
    logp_ba = -batch.target_ba.astype(np.float32)
    logp_ba[batch.answer_ba == 0] = np.nan
    expected_y = [-sum(answer) for answer in ANSWERS]
    np.testing.assert_array_equal(label_sums(batch, logp_ba, 3), [expected_y, expected_y, [0, 0, 0]])


def test_bucket_is_the_smallest_that_fits() -> None:
    assert [bucket(length, LENGTHS) for length in (1, 12, 13, 24)] == [12, 12, 16, 24]
    with pytest.raises(ValueError, match="25 tokens is longer than the largest"):
        bucket(25, LENGTHS)


# --- text ---


@pytest.mark.parametrize("tokens", [2, 9, 10, 11, 12, 25, 30, 31])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_windows_predict_every_token_but_their_first(tokens: int, batch_size: int) -> None:
    text, window = list(range(500, 500 + tokens)), 10
    batches = list(text_batches(text, window, batch_size))
    assert {batch.tokens_bt.shape for batch in batches} == {(batch_size, min(tokens, window))}
    assert {batch.source_ba.shape for batch in batches} == {(batch_size, min(tokens, window) - 1)}
    assert len(batches) == -(-max(1, -(-(tokens - 1) // window)) // batch_size)
    found = [predictions(batch, row, 1) for batch in batches for row in range(batch_size)]
    expected = [alone(text[start : start + 1], text[start + 1 : start + window]) for start in range(0, tokens, window)]
    assert [part for part in found if part] == [part for part in expected if part]


def test_a_text_without_a_token_to_predict_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="the text has 1 tokens"):
        list(text_batches([5], window=8))
    with pytest.raises(UserError, match="a window of 1 tokens"):
        list(text_batches([5, 6], window=1))


def test_padding_share_counts_positions_without_a_token() -> None:
    batches = list(text_batches(range(14), window=10, batch_size=3))
    assert padding_share(batches) == pytest.approx(1 - 14 / 30)
    assert padding_share([]) == 0

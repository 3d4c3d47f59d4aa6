"""From token ids to batches: arrays of a few fixed shapes, in an order that is a function of (seed, step).

A row of a batch is a prompt and one or more *branches*, the tokens of one answer each. All branches of a row stand
behind its prompt; a branch sees the prompt and itself, and its positions begin where the prompt's end, as if it stood
there alone. So one forward scores every label of an example, and reads the prompt once:

    query t sees key s  ⇔  s ≤ t  and  (branch_s = 0  or  branch_s = branch_t)  and  branch_s ≠ -1

The last token of an answer, the end of the turn, is predicted but never read. Lengths are padded up to a few buckets,
as each shape costs a compilation, and rows of similar length share a micro-batch, as padding costs time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grain
import numpy as np

from research.config import TrainConfig
from research.errors import UserError
from research.tasks.encoding import EncodedExamples
from research.tasks.packing import first_fit

_MOST_PACKED = 8


class Batch(NamedTuple):
    """Rows for one forward. `b` rows · `t` positions · `a` slots for predictions; all int32 numpy arrays.

    An empty row (see `scoring_batches`) has no slot in use; it has one token, so that no query is left without a key.
    """

    tokens_bt: np.ndarray
    """Token ids; 0 where there is padding."""
    position_bt: np.ndarray
    """Position for the rotary embedding; 0 where there is padding."""
    index_bt: np.ndarray
    """Place in the row, which is what causality goes by; t itself but for `reordered` batches."""
    branch_bt: np.ndarray
    """0 = prompt, j ≥ 1 = the j-th answer in this row, -1 = padding."""
    source_ba: np.ndarray
    """Index t of the hidden state that predicts; 0 in an unused slot."""
    target_ba: np.ndarray
    """Token id to be predicted; 0 in an unused slot."""
    answer_ba: np.ndarray
    """Branch that the predicted token belongs to; 0 = unused slot."""


@dataclass(frozen=True)
class ScoringBatch:
    """A batch whose rows have one branch a label, and the examples that the rows are. A plain text has one branch."""

    batch: Batch
    example_b: np.ndarray
    """Number of the example in each row, int64, [b]; -1 = empty row."""


class TrainingOrder:
    """Which examples make up the batch of a step: a function of (seed, step) and of nothing else.

    Every epoch shuffles the examples anew, and uses none twice; those left over when the examples are no multiple of
    the batch (other ones each epoch) are left out of it.
    """

    def __init__(self, examples: int, seed: int, batch_size: int) -> None:
        """Prepare the order of so many examples."""
        if seed < 0:
            raise UserError(f"train.seed={seed}: give 0 or more")
        if examples < batch_size:
            raise UserError(
                f"train.batch_size={batch_size} is larger than the training split of {examples} examples; "
                "give a smaller batch, or more data"
            )
        self.batch_size = batch_size
        self.batches_per_epoch = examples // batch_size
        self._examples = examples
        grain_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._shuffled = grain.MapDataset.range(examples).shuffle(seed=grain_seed).repeat()

    def rows(self, step: int) -> np.ndarray:
        """Return the numbers of the examples in the batch of `step`, int64, [b]."""
        epoch, place = divmod(step, self.batches_per_epoch)
        start = epoch * self._examples + place * self.batch_size
        return np.array([self._shuffled[start + i] for i in range(self.batch_size)])


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """What a training split is cut into batches by; `label_rows` and `window_rows` make it.

    Attributes:
      length_e: tokens that the row of each example reads, int [e].
      sizes: increasing sizes of t; a micro-batch gets the smallest that holds its longest row.
      make: (numbers of the examples in each row, t, examples that a row has room for) → the batch of these rows.
    """

    length_e: np.ndarray
    sizes: Sequence[int]
    make: Callable[[Sequence[Sequence[int]], int, int], Batch]

    @property
    def most(self) -> int:
        """Examples that a row of the largest size may hold; each has places for its predictions, used or not."""
        return max(1, min(_MOST_PACKED, self.sizes[-1] // int(self.length_e.min())))


def most_texts(train: TrainConfig) -> int:
    """Return how many texts a row of `training_batches` holds at most.

    One stands behind the other, each a branch of its own: an example with its answer, or a window. No prompt is shared.
    """
    return _MOST_PACKED if train.pack else 1


def label_rows(examples: EncodedExamples, lengths: Sequence[int]) -> TrainingRows:
    """Return rows of examples with their true labels, a branch each; `lengths`: sizes of t, in tokens."""
    slots = max(len(answer) for answer in examples.answers)
    answers = [examples.answers[label] for label in examples.gold_e]
    # The last token of an answer is not read.
    length_e = np.array([len(p) + len(answer) - 1 for p, answer in zip(examples.prompts, answers, strict=True)])

    def make(rows: Sequence[Sequence[int]], length: int, most: int) -> Batch:
        batch = _empty_batch(len(rows), length, slots * most)
        for row, numbers in enumerate(rows):
            end = 0
            for branch, number in enumerate(numbers, start=1):
                prompt, answer = examples.prompts[number], answers[number]
                _put(batch, row, end, np.concatenate([prompt, answer[:-1]]), 0, branch)
                first, predictor = slots * (branch - 1), end + len(prompt) - 1
                _predict(batch, row, first, range(predictor, predictor + len(answer)), answer, branch)
                end += int(length_e[number])
        return batch

    return TrainingRows(length_e, lengths, make)


def window_rows(windows: Sequence[np.ndarray], length: int) -> TrainingRows:
    """Return rows of plain text; every token but a window's first is predicted.

    `windows`: token ids of each, at most `length`, which is t of all batches.
    """

    def make(rows: Sequence[Sequence[int]], length: int, most: int) -> Batch:
        batch = _empty_batch(len(rows), length, length - 1)
        for row, numbers in enumerate(rows):
            end = 0
            for branch, number in enumerate(numbers, start=1):
                _put_window(batch, row, end, windows[number], branch)
                end += len(windows[number])
        return batch

    return TrainingRows(np.array([len(window) for window in windows]), (length,), make)


def training_batches(rows: TrainingRows, train: TrainConfig, multiple: int = 1) -> grain.MapDataset[tuple[Batch, ...]]:
    """Return the micro-batches of a run, by step: `dataset[step]`, or `iter(dataset[start:])` to prefetch.

    The rows of a step are a fair sample; they are sorted by length before they are cut into micro-batches, each padded
    on its own, so little is wasted. (Sorting across steps would save more, but where length and label go together it
    makes batches of one label, and training swings between them.)
    With `train.pack` the examples of a step share rows of the largest size, each in a branch of its own, so that the
    loss is that of the step all the same. What a step gets doesn't depend on `train.steps` nor on what was read before.

    Args:
        rows: the training split.
        train: says seed, steps, batch size and micro-batches.
        multiple: of which the rows of a packed micro-batch are, empty ones added.

    Raises:
        UserError: a batch larger than the split.
    """
    order, parts = TrainingOrder(len(rows.length_e), train.seed, train.batch_size), train.accumulate

    def make(step: int) -> tuple[Batch, ...]:
        numbers = order.rows(step)
        if train.pack:
            fitted = first_fit(rows.length_e[numbers], rows.sizes[-1], rows.most)
            packed: list[list[int]] = [numbers[row].tolist() for row in fitted]
            packed += [[]] * (-len(packed) % (multiple * parts))
            # Dealt out, so that no micro-batch is made of empty rows.
            return tuple(rows.make(packed[part::parts], rows.sizes[-1], rows.most) for part in range(parts))
        by_length = numbers[np.argsort(rows.length_e[numbers], kind="stable")]
        return tuple(make_part(part) for part in np.split(by_length, parts))

    def make_part(numbers: np.ndarray) -> Batch:
        length = bucket(int(rows.length_e[numbers].max()), rows.sizes)
        return rows.make([[number] for number in numbers], length, 1)

    return grain.MapDataset.range(train.steps).map(make)


def scoring_batches(examples: EncodedExamples, lengths: Sequence[int], batch_size: int) -> Iterator[ScoringBatch]:
    """Yield batches that score all labels of each example, each example exactly once, in the order of their lengths.

    Label y is branch y + 1 of its row. The last batch is filled up with empty rows.
    """
    answers = list(examples.answers)
    slots, inputs = sum(len(answer) for answer in answers), sum(len(answer) - 1 for answer in answers)
    row_lengths = np.array([len(prompt) + inputs for prompt in examples.prompts], np.int64)
    order = np.argsort(row_lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        rows = [(examples.prompts[number], answers) for number in numbers]
        batch = _make_batch(rows, batch_size, bucket(int(row_lengths[numbers].max()), lengths), slots)
        yield ScoringBatch(batch, np.pad(numbers, (0, batch_size - len(numbers)), constant_values=-1))


def label_sums(batch: Batch, x_ba: np.ndarray, labels: int) -> np.ndarray:
    """Sum what is known of predicted tokens, e.g. their log-probability, over each label's answer.

    Args:
        batch: as `scoring_batches` or `window_scoring_batches` made it.
        x_ba: a number for each of `target_ba`, [b, a]; whatever stands in unused slots is ignored.
        labels: number of labels.

    Returns:
        Sum of each label, float64, [b, y]; 0 in empty rows.
    """
    used_bay = batch.answer_ba[:, :, None] == np.arange(1, labels + 1)
    return np.where(used_bay, np.asarray(x_ba, np.float64)[:, :, None], 0.0).sum(axis=1)


def gather_examples(batches: Iterable[tuple[ScoringBatch, np.ndarray]], examples: int) -> np.ndarray:
    """Put rows of several scoring batches back into the order of the examples.

    Args:
        batches: pairs of a batch and an array whose leading axis is its rows, e.g. logp_by.
        examples: number of examples.

    Raises:
        ValueError: an example is missing, or there twice.
    """
    numbers, values = [], []
    for scoring, value_b in batches:
        real = scoring.example_b >= 0
        numbers.append(scoring.example_b[real])
        values.append(np.asarray(value_b)[real])
    order = np.argsort(np.concatenate(numbers), kind="stable")
    if not np.array_equal(np.concatenate(numbers)[order], np.arange(examples)):
        raise ValueError(f"the batches do not hold each of {examples} examples exactly once")
    return np.concatenate(values)[order]


def text_batches(tokens: Sequence[int], window: int, batch_size: int = 1) -> Iterator[Batch]:
    """Yield the consecutive windows of a text, in which every token but the window's first is predicted.

    Windows don't overlap. A text no longer than the window is one row of exactly its length. Else each row has `window`
    tokens, the last is padded, and the last batch is filled up with empty rows. So there is one shape for a text.

    Args:
        tokens: ids of the text, special tokens included.
        window: tokens of context at most.
        batch_size: windows for one forward.

    Raises:
        UserError: the text has no token to predict.
    """
    if window < 2:
        raise UserError(f"a window of {window} tokens predicts nothing; give at least 2")
    ids = np.asarray(tokens, np.int32)
    if len(ids) < 2:
        raise UserError(f"the text has {len(ids)} tokens; the first is not predicted, so give a text of at least 2")
    length = min(window, len(ids))
    # A last window of one token predicts nothing.
    windows = [ids[start : start + length] for start in range(0, len(ids) - 1, length)]
    for part in window_scoring_batches(windows, length, batch_size):
        yield part.batch


def window_scoring_batches(windows: Sequence[np.ndarray], length: int, batch_size: int) -> Iterator[ScoringBatch]:
    """Yield batches that score windows of plain text, of at most `length` tokens, each once and in their order.

    A window is one branch, as if all its tokens but the first were the answer of an only label. The last batch is
    filled up with empty rows.
    """
    for start in range(0, len(windows), batch_size):
        part = windows[start : start + batch_size]
        numbers = np.pad(np.arange(start, start + len(part)), (0, batch_size - len(part)), constant_values=-1)
        yield ScoringBatch(window_batch(part, batch_size, length), numbers)


def window_batch(windows: Sequence[np.ndarray], batch_size: int, length: int) -> Batch:
    """Return rows of plain text, a window of at most `length` token ids each, and empty rows up to `batch_size`."""
    batch = _empty_batch(batch_size, length, length - 1)
    for row, window in enumerate(windows):
        _put_window(batch, row, 0, window, 0)
    return batch


def without_empty_rows(batch: Batch) -> Batch:
    """Return the batch with the one token of its empty rows marked as padding: it is of no text."""
    return batch._replace(branch_bt=np.where(_filled(batch)[:, None], batch.branch_bt, -1))


def reordered(batch: Batch, order_t: np.ndarray) -> Batch:
    """Return a batch whose token at place t is that of place `order_t[t]`; what the slots predict stays the same."""
    tokens = {name: getattr(batch, name)[:, order_t] for name in ("tokens_bt", "position_bt", "index_bt", "branch_bt")}
    return batch._replace(**tokens, source_ba=np.argsort(order_t).astype(np.int32)[batch.source_ba])


def padding_share(batches: Iterable[Batch]) -> float:
    """Return the fraction of the batches' positions that hold no token of an example."""
    total = used = 0
    for batch in batches:
        total += batch.branch_bt.size
        used += int((batch.branch_bt[_filled(batch)] >= 0).sum())
    return 1 - used / total if total else 0.0


def _filled(batch: Batch) -> np.ndarray:
    """Return which rows are no empty ones, boolean [b]."""
    return np.any(batch.answer_ba > 0, axis=1)


def bucket(length: int, lengths: Sequence[int]) -> int:
    """Return the smallest of `lengths` that is at least `length`."""
    fitting = [size for size in lengths if size >= length]
    if not fitting:
        raise ValueError(f"a row of {length} tokens is longer than the largest of {tuple(lengths)}")
    return min(fitting)


def _make_batch(
    rows: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]], batch_size: int, length: int, slots: int
) -> Batch:
    """Lay out rows of (prompt, answers), of which there are at most `batch_size`."""
    batch = _empty_batch(batch_size, length, slots)
    for row, (prompt, answers) in enumerate(rows):
        _put(batch, row, 0, prompt, 0, 0)
        end, slot = len(prompt), 0
        for branch, answer in enumerate(answers, start=1):
            read = len(answer) - 1
            _put(batch, row, end, answer[:-1], len(prompt), branch)
            _predict(batch, row, slot, [len(prompt) - 1, *range(end, end + read)], answer, branch)
            end, slot = end + read, slot + len(answer)
    return batch


def _put(batch: Batch, row: int, start: int, tokens: np.ndarray, position: int, branch: int) -> None:
    place = slice(start, start + len(tokens))
    batch.tokens_bt[row, place] = tokens
    batch.position_bt[row, place] = np.arange(position, position + len(tokens))
    batch.branch_bt[row, place] = branch


def _put_window(batch: Batch, row: int, start: int, window: np.ndarray, branch: int) -> None:
    """Lay out a window from `start`: alone in its row (0), or the `branch`-th there."""
    _put(batch, row, start, window, 0, branch)
    sources = range(start, start + len(window) - 1)
    _predict(batch, row, start - max(0, branch - 1), sources, window[1:], max(1, branch))


def _predict(batch: Batch, row: int, slot: int, sources: Sequence[int], targets: np.ndarray, branch: int) -> None:
    place = slice(slot, slot + len(targets))
    batch.source_ba[row, place] = sources
    batch.target_ba[row, place] = targets
    batch.answer_ba[row, place] = branch


def _empty_batch(batch_size: int, length: int, slots: int) -> Batch:
    """Return a batch of empty rows; its arrays are there to be filled."""
    tokens, position, branch = (np.zeros((batch_size, length), np.int32) for _ in range(3))
    index = np.tile(np.arange(length, dtype=np.int32), (batch_size, 1))
    batch = Batch(tokens, position, index, branch, *(np.zeros((batch_size, slots), np.int32) for _ in range(3)))
    batch.branch_bt[:, 1:] = -1
    return batch

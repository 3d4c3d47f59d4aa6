"""Tasks: splits that don't leak and don't depend on order, the two packaged sets, and the user's own file."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from research.config import TaskConfig
from research.errors import UserError
from research.packages import default_cache
from research.tasks import load_task, sms_spam, trec
from research.tasks.task import Example, Task, make_task, normalise

ROWS = [Example(f"message number {i}", ("ham", "spam")[i % 3 == 0]) for i in range(300)]


def make(rows: list[Example], **config: object) -> Task:
    settings = TaskConfig(**{"validation_examples": 0, "test_examples": 0, **config})
    return make_task("toy", ("ham", "spam"), rows, "Ham or spam? {text}", "made up", settings)


def everything(task: Task) -> list[Example]:
    return [*task.train, *task.validation, *task.test]


def load_own(path: Path, **config: object) -> Task:
    return load_task(TaskConfig(name="own_data", path=str(path), **config), report=lambda line: None)


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


# --- splits ---


def test_splits_hold_each_row_once_in_shares_of_80_10_10() -> None:
    task = make([Example(f"message number {i}", ROWS[i % 300].label) for i in range(5000)])
    assert len({example.text for example in everything(task)}) == len(everything(task)) == 5000
    # The standard deviation of a 10 % share of 5,000 is 0.42 %; four of them on either side.
    for split, share in ((task.train, 0.8), (task.validation, 0.1), (task.test, 0.1)):
        assert len(split) / 5000 == pytest.approx(share, abs=0.017 if share == 0.1 else 0.023)


def test_splits_do_not_depend_on_the_order_of_rows() -> None:
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    assert make(shuffled) == make(ROWS)


def test_a_new_row_moves_no_other() -> None:
    before, after = make(ROWS), make([*ROWS, Example("one more", "ham")])
    for split in ("train", "validation", "test"):
        kept = tuple(example for example in getattr(after, split) if example.text != "one more")
        assert kept == getattr(before, split)


def test_a_label_moves_no_row() -> None:
    relabelled = make([replace(row, label="ham" if row.label == "spam" else "spam") for row in ROWS])
    for split in ("train", "validation", "test"):
        texts = [[row.text for row in getattr(task, split)] for task in (relabelled, make(ROWS))]
        assert texts[0] == texts[1]


def test_a_selection_is_the_beginning_of_the_split() -> None:
    whole, part = make(ROWS), make(ROWS, train_examples=7, validation_examples=5, test_examples=3)
    assert part.train == whole.train[:7]
    assert part.validation == whole.validation[:5]
    assert part.test == whole.test[:3]
    # In the order of hashes, not of the rows.
    assert [example.text for example in whole.train] != sorted(example.text for example in whole.train)


def test_duplicates_are_removed_and_counted_whatever_their_spelling() -> None:
    same = [Example(" message  number\n1 ", ROWS[1].label), Example("message number 1", ROWS[1].label)]
    task = make([*ROWS, *same])
    assert task.duplicates_removed == 2
    assert len(everything(task)) == 300
    assert make([*same, *ROWS]) == task


def test_texts_with_two_labels_are_removed_and_counted() -> None:
    task = make([*ROWS, Example("message number 1", "spam"), Example("message number 1", "ham")])
    assert (task.contradictions_removed, task.duplicates_removed) == (3, 0)
    assert "message number 1" not in {example.text for example in everything(task)}
    assert "3 rows whose text also has another label removed" in task.summary()


def test_normalise_joins_spellings_but_keeps_case() -> None:
    assert normalise(" cafe\u0301\t au\u00a0lait\n") == "caf\u00e9 au lait"
    assert normalise("FREE") != normalise("free")


def test_the_fingerprint_is_that_of_all_that_the_model_is_shown() -> None:
    task = make(ROWS)
    assert task.fingerprint == make(ROWS[::-1]).fingerprint
    changed = [
        make(ROWS[1:]),
        make([Example(ROWS[0].text, "ham"), *ROWS[1:]]),
        make(ROWS, prompt="{text}"),
        make(ROWS, train_examples=200),
        replace(task, labels=("spam", "ham")),
    ]
    assert len({task.fingerprint, *(other.fingerprint for other in changed)}) == 6


def test_a_split_without_examples_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="split: 2 different texts are too few"):
        make(ROWS[:2])


def test_the_configs_prompt_replaces_the_tasks_and_holds_the_text_once() -> None:
    assert make(ROWS).prompt == "Ham or spam? {text}"
    assert make(ROWS, prompt="{text} ?").prompt == "{text} ?"
    with pytest.raises(UserError, match="exactly once"):
        make(ROWS, prompt="{text} {text}")


def test_summary_tells_sizes_shares_and_duplicates() -> None:
    summary = make([Example("a", "ham")] * 2 + ROWS, train_examples=10).summary()
    assert summary.startswith("toy: train 10 (")
    assert "% ham" in summary and "1 duplicates removed" in summary


# --- names ---


def test_an_unknown_task_is_told_its_nearest_name() -> None:
    with pytest.raises(UserError, match="'sms-spam' is not a task; did you mean 'sms_spam'"):
        load_task(TaskConfig(name="sms-spam"))


@pytest.mark.parametrize("field", ["text_column", "label_column"])
def test_a_field_that_the_task_does_not_read_is_an_error(field: str) -> None:
    with pytest.raises(UserError, match=f"task.{field}='mine' has no effect on task.name='trec'"):
        load_task(TaskConfig(name="trec", **{field: "mine"}))


# --- the user's own data ---


def test_jsonl_and_csv_make_the_same_task(tmp_path: Path) -> None:
    rows = [{"id": i, "said": f'line {i}, "quoted"\nand more', "mood": ("glad", "sad")[i % 2]} for i in range(80)]
    csv_lines = ["id,said,mood"] + [f'{r["id"]},"line {r["id"]}, ""quoted""\nand more",{r["mood"]}' for r in rows]
    tasks = [
        load_own(path, text_column="said", label_column="mood")
        for path in (jsonl(tmp_path / "a.jsonl", rows), write(tmp_path / "a.csv", "\n".join(csv_lines)))
    ]
    assert tasks[0].labels == ("glad", "sad")
    assert everything(tasks[0]) == everything(tasks[1])
    assert 'line 7, "quoted"\nand more' in {example.text for example in everything(tasks[0])}
    assert tasks[0].prompt == "Answer glad or sad:\n{text}"


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_no_rows(tmp_path: Path) -> None:
    lines = [f'{{"text": "t {i}", "label": {i % 3}}}' for i in range(90)]
    for name, content in {
        "plain": "\n".join(lines),
        "marked": "\ufeff" + "\r\n".join(lines) + "\r\n\r\n",
        "separators": "\n".join(lines).replace("t 7", "t \u2028 7"),
    }.items():
        task = load_own(write(tmp_path / f"{name}.jsonl", content))
        assert task.labels == ("0", "1", "2")
        assert len(task.train) > 60
    csv = "\ufefftext,label\r\n\r\n" + "\r\n".join(f"t {i},{i % 2}" for i in range(90)) + "\r\n"
    assert load_own(write(tmp_path / "a.csv", csv)).labels == ("0", "1")


GOOD = '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("not json", r":3: not JSON \(Expecting value\)"),
        ("[1, 2]", r":3: \[1, 2\] is not a JSON object"),
        ("[" * 100_000, ":3: not JSON"),
        ('{"texts": "a", "label": "x"}', r":3: there is no column 'text' \(task.text_column\); did you mean 'texts'"),
        ('{"text": "a", "b": "x"}', r":3: there is no column 'label' \(task.label_column\); valid: b, text"),
        ('{"text": " ", "label": "x"}', ":3: column 'text' is empty"),
        ('{"text": "a", "label": ""}', ":3: column 'label' is empty"),
        ('{"text": 3, "label": "x"}', ":3: column 'text' is 3; give a text"),
        ('{"text": "a", "label": null}', ":3: column 'label' is null; give a text or a whole number"),
        ('{"text": "a", "label": 0.5}', ":3: column 'label' is 0.5"),
        (r'{"text": "a \ud83d", "label": "x"}', ":3: column 'text' has half of a surrogate pair"),
    ],
)
def test_a_bad_json_row_is_told_by_file_line_and_reason(tmp_path: Path, row: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"mine.jsonl{reason}"):
        load_own(write(tmp_path / "mine.jsonl", GOOD + row + "\n"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("tekst,label\na,x\n", r":1: there is no column 'text' \(task.text_column\); did you mean 'tekst'"),
        ("text,text,label\na,b,x\n", ":1: the header names column 'text' twice"),
        ('text,label\n"a\nb",x\nc, d,y\n', ":4: 3 values, but the header names 2 columns"),
        ("text,label\na\n", ":2: 1 values, but the header names 2 columns"),
        ('text,label\na,x\n"open,y\nb,x\n', r":3: not CSV \(unexpected end of data\)"),
        ('text,label\na,x\n"b" c,y\n', ":3: not CSV"),
        ("text,label\na,x\n,y\n", ":3: column 'text' is empty"),
        ("text,label\na,x\nb, \n", ":3: column 'label' is empty"),
        ("text,label\n", ": it has no rows"),
        ("", ": it has no rows"),
        ("text,label\na,x\nb,x\n", ": every row has the label 'x' in column 'label'"),
    ],
)
def test_a_bad_csv_file_is_told_by_file_line_and_reason(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"mine.csv{reason}"):
        load_own(write(tmp_path / "mine.csv", content))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_file_in_another_encoding_is_told_by_line_and_byte(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(mark + b"text,label\na,x\ncaf\xe9,y\n")
    with pytest.raises(UserError, match="a.csv:3: byte 0xe9 is not UTF-8"):
        load_own(tmp_path / "a.csv")


def test_a_file_that_is_not_there_or_of_another_kind_is_told(tmp_path: Path) -> None:
    jsonl(tmp_path / "reviews.jsonl", [])
    with pytest.raises(UserError, match="there is no such file; did you mean 'reviews.jsonl'"):
        load_own(tmp_path / "review.jsonl")
    with pytest.raises(UserError, match=r"give a .jsonl or .csv file, this ends in '.xlsx'"):
        load_own(tmp_path / "reviews.xlsx")
    with pytest.raises(UserError, match="are both 'label'"):
        load_own(tmp_path / "reviews.jsonl", text_column="label")


def test_labels_with_braces_do_not_disturb_the_prompt(tmp_path: Path) -> None:
    rows = [{"text": f"t {i} {{text}} {{}}", "label": ("{a}", "b")[i % 2]} for i in range(80)]
    assert load_own(jsonl(tmp_path / "a.jsonl", rows)).prompt == "Answer b or {a}:\n{text}"


# --- the packaged sets ---


def test_repair_cuts_swallowed_messages_out_and_refuses_other_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    content = ',spam,text\n0,0,"one\nspam\ttwo\nham\tthree, and\nmore"\n1,1,four\n'
    monkeypatch.setattr(sms_spam, "MESSAGES", 4)
    monkeypatch.setattr(sms_spam, "SPAM", 2)
    assert sms_spam.repair(content, "toy.csv") == [
        Example("one", "ham"),
        Example("two", "spam"),
        Example("three, and\nmore", "ham"),
        Example("four", "spam"),
    ]
    with pytest.raises(UserError, match="toy.csv: 5 messages with 2 spam after the repair, expected 4 with 2"):
        sms_spam.repair(content + "2,0,five\n", "toy.csv")


def test_trec_reads_classes_as_words_and_refuses_other_files(monkeypatch: pytest.MonkeyPatch) -> None:
    content = "DESC:manner How do : colons stay ?\nHUM:ind Who ?\nHUM:ind Who ?\n\n"
    monkeypatch.setattr(trec, "LINES", 3)
    monkeypatch.setattr(trec, "QUESTIONS", 2)
    who = Example("Who ?", "person")
    assert trec.read(content, "toy.txt") == [Example("How do : colons stay ?", "description"), who, who]
    with pytest.raises(UserError, match=r"'FOO:ind Who \?' is not of the form"):
        trec.read(content.replace("HUM", "FOO"), "toy.txt")
    with pytest.raises(UserError, match="toy.txt: 1 questions, 1 of them different, expected 3 and 2"):
        trec.read("HUM:ind Who ?", "toy.txt")


@pytest.mark.foundation
def test_sms_spam_has_the_published_counts() -> None:
    lines: list[str] = []
    config = TaskConfig(validation_examples=0, test_examples=0)
    task = load_task(config, default_cache(), lines.append)
    rows = everything(task)
    assert len(rows) == len({normalise(row.text) for row in rows}) == 5_160
    assert (task.duplicates_removed, task.contradictions_removed) == (5_574 - 5_160, 0)
    assert (len(task.train), len(task.validation), len(task.test)) == (4_104, 540, 516)
    assert lines[-1] == task.summary()
    assert Example("Ok lar... Joking wif u oni...", "ham") in rows
    assert not any("\nham\t" in row.text or "\nspam\t" in row.text for row in rows)


@pytest.mark.foundation
def test_trec_has_its_questions_and_classes() -> None:
    config = TaskConfig(name="trec", validation_examples=0, test_examples=0)
    task = load_task(config, default_cache(), lambda line: None)
    rows = everything(task)
    # 5,382 different lines; one question stands there under two subclasses of one class.
    assert len(rows) == 5_381
    assert (task.duplicates_removed, task.contradictions_removed) == (15_452 - 5_381, 0)
    assert {row.label for row in rows} == set(task.labels)
    assert Example("What films featured the character Popeye Doyle ?", "thing") in rows

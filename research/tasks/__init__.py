"""Tasks: a data source, a prompt and labels each, under one name that a config gives."""

from collections.abc import Callable
from pathlib import Path

from research.config import TaskConfig
from research.errors import UserError, nearest
from research.tasks import own_data, sms_spam, trec
from research.tasks.task import Task

TASKS: dict[str, Callable[[TaskConfig, Path | None, Callable[[str], None]], Task]] = {
    "own_data": own_data.load,
    "sms_spam": sms_spam.load,
    "trec": trec.load,
}

# Fields that only own_data reads; set for another task they would have no effect. (`path`: the config checks it.)
_OWN_DATA_FIELDS = ("text_column", "label_column")


def load_task(config: TaskConfig, cache: Path | None = None, report: Callable[[str], None] = print) -> Task:
    """Return the task that the config names, split and selected, and report its sizes in a line.

    Args:
        config: the task and how much of it to use.
        cache: folder for downloads; None: the default one.
        report: called with each line about what is done.

    Raises:
        UserError: an unknown task, a field that this task doesn't read, or data that can't be had or read.
    """
    if config.name not in TASKS:
        raise UserError(f"task.name={config.name!r} is not a task{nearest(config.name, TASKS)}")
    if config.name != "own_data":
        for field in _OWN_DATA_FIELDS:
            value = getattr(config, field)
            if value != TaskConfig.__dataclass_fields__[field].default:
                raise UserError(
                    f"task.{field}={value!r} has no effect on task.name={config.name!r}; only own_data reads it"
                )
    task = TASKS[config.name](config, cache, report)
    report(task.summary())
    return task

"""Tasks of the Language Model Evaluation Harness: what alignment costs in what the model could do before."""

import logging
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dpo.errors import ConfigError, DataError, nearest
from dpo.model.base import LanguageModel, Role

BATCH_SIZE = 16
"""Requests at once; the harness sorts them by length."""


def check_tasks(tasks: Sequence[str]) -> None:
    """Find out what is missing before a model is trained.

    Raises:
        ConfigError: the package is not installed, or a task is neither one of its own nor a YAML file.
    """
    if not tasks:
        return
    known = _index(tasks).all_tasks
    for name in tasks:
        if _is_file(name):
            if not Path(name).is_file():
                raise ConfigError(f"evaluation.harness: there is no file {name}. Name a task's YAML file.")
        elif name not in known:
            raise ConfigError(
                f"evaluation.harness: got {name!r}, expected a task of lm-eval or a YAML file.{nearest(name, known)} "
                "`lm-eval ls tasks` lists them."
            )


def score_items(model: LanguageModel, role: Role, tasks: Sequence[str], limit: int | None) -> dict[str, float]:
    """Return what `role` earns on each item of the tasks, by task/item: the task's first metric, such as acc.

    Args:
        model: the model and its roles.
        role: who answers.
        tasks: names of tasks, groups of them or YAML files.
        limit: the first so many items of each task (None: all).

    Raises:
        DataError: a task's data cannot be loaded, or it has no metric that gives each item a number.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    carry_out: Any = simple_evaluate  # whose decorators hide the signature
    wrap: Any = HFLM
    with model.reading(role) as network:
        answering = wrap(
            pretrained=network,
            tokenizer=model.tokenizer,
            batch_size=BATCH_SIZE,
            # It opens an autocast context of its own, which without this would end the one that adapters need.
            mixed_precision_dtype=model.dtype if model.mixed else None,
        )
        try:
            found = carry_out(
                answering, tasks=[*tasks], limit=limit, task_manager=_index(tasks), log_samples=True, bootstrap_iters=0
            )
        except (OSError, ValueError, KeyError) as error:  # of its loaders, for data that is absent or of another form
            raise DataError(
                f"evaluation.harness={','.join(tasks)}: cannot be carried out ({type(error).__name__}: {error}). Check "
                "that the tasks' data can be reached, or leave them out."
            ) from error
    return {
        f"{task}/{sample['doc_id']}": _number(task, sample)
        for task, samples in found["samples"].items()
        for sample in samples
        if sample["filter"] == samples[0]["filter"]  # an item answered once may be read in several ways
    }


def _number(task: str, sample: dict[str, Any]) -> float:
    name = sample["metrics"][0]
    value = sample.get(name)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(
            f"evaluation.harness: {task} gives its item {sample['doc_id']} the {name} {value!r}, expected a number. "
            "Choose a task that is scored item by item, such as one with acc or exact_match."
        )
    return float(value)


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def _index(tasks: Sequence[str]) -> Any:
    return _read_index(all(map(_is_file, tasks)))


@cache
def _read_index(files_alone: bool) -> Any:
    """Return the harness's index of tasks; reading its own, which files do not need, takes seconds.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("evaluation.harness needs the package lm-eval: pip install 'dpo-lab[harness]'.") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=not files_alone)

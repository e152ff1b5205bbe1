"""How time and memory grow with more rows, and with longer ones: ours alone, a fresh process for every size."""

from collections.abc import Callable, Sequence

from benchmarks.report import Result, Row, mebibytes
from benchmarks.scenarios import HH_MAX_LENGTH, Shape, derive, to_rows
from benchmarks.turns import Job
from dpo.data import Example

ROWS, ROW_FACTORS = 100, (1, 4, 16)
SHAPE, LENGTH_FACTORS = Shape(prompt=100, completion=50), (1, 2, 4)

Measure = Callable[[Job], Result]
"""Carries one job out, alone."""


def data_table(measure: Measure, model: str, file: str, batch: int, warmup: int, rounds: int) -> list[Row]:
    """Measure 1, 4 and 16 times as many rows, all of them checked and tokenised, and the same few steps of each.

    A file that holds fewer ends the growth: the table shows what was read.
    """
    table: list[Row] = [["rows read", "pairs kept", *_HEADING, "seconds to prepare", "milliseconds a row"]]
    for factor in ROW_FACTORS:
        data = {"train": file, "eval_share": 0, "max_length": HH_MAX_LENGTH, "limit": ROWS * factor}
        result = measure(Job("ours", model, batch, warmup, rounds, data=data))
        prepare = [f"{result.prepare_seconds:.2f}", f"{1000 * result.prepare_seconds / result.rows:.2f}"]
        table.append([str(result.rows), str(result.examples), *_cells(result, batch), *prepare])
    return table


def length_table(
    measure: Measure, model: str, pairs: Sequence[Example], batch: int, warmup: int, rounds: int
) -> list[Row]:
    """Measure prompts and completions 1, 2 and 4 times as long."""
    table: list[Row] = [["tokens of prompt + each completion", *_HEADING]]
    for factor in LENGTH_FACTORS:
        shape = Shape(SHAPE.prompt * factor, SHAPE.completion * factor)
        rows = to_rows(derive(pairs, shape, batch * (warmup + rounds)))
        result = measure(Job("ours", model, batch, warmup, rounds, rows=rows))
        table.append([f"{shape.prompt} + {shape.completion} ({factor}x)", *_cells(result, batch)])
    return table


_HEADING = ["seconds an example", "MiB above model"]


def _cells(result: Result, batch: int) -> list[str]:
    seconds = sorted(result.seconds)[len(result.seconds) // 2]
    return [f"{seconds / batch:.3f}", mebibytes(max(result.prepare_bytes, result.step_bytes))]

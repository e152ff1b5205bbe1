"""Growth is measured in fresh processes, and its tables show what was really read."""

from dataclasses import replace

from benchmarks.growth import data_table, length_table
from benchmarks.report import Result
from benchmarks.turns import Job
from dpo.data import Example

MIB = 2**20
PAIR = Example(tuple(range(90)), (tuple(range(40)), tuple(range(50))), 1.0, True, 1.0, "file:1", (), ())
RESULT = Result("ours", (8.0, 4.0, 6.0), (), 0.7, 100, 0, 0, 2.0, 7 * MIB, 5 * MIB)


def test_data_grow_up_to_the_end_of_the_file():
    asked: list[Job] = []

    def measure(job: Job) -> Result:
        asked.append(job)
        assert job.data is not None
        read = min(job.data["limit"], 500)
        return replace(RESULT, rows=read, examples=read - 10)

    table = data_table(measure, "model", "file", batch=2, warmup=1, rounds=3)
    assert [job.data["limit"] for job in asked if job.data is not None] == [100, 400, 1600]
    assert [row[0] for row in table[1:]] == ["100", "400", "500"]
    # median 6 s for 2 examples; the larger of the two peaks; 2 s for 400 rows
    assert list(table[2][1:]) == ["390", "3.000", "7", "2.00", "5.00"]


def test_lengths_grow():
    asked: list[Job] = []

    def measure(job: Job) -> Result:
        asked.append(job)
        return RESULT

    table = length_table(measure, "model", [PAIR], batch=2, warmup=1, rounds=3)
    assert [len(job.rows) for job in asked] == [8, 8, 8]
    total = [sum(len(part) for row in job.rows for part in row) for job in asked]
    assert 1.8 < total[1] / total[0] < 2.2
    assert 3.6 < total[2] / total[0] < 4.4
    assert [row[0] for row in table[1:]] == ["100 + 50 (1x)", "200 + 100 (2x)", "400 + 200 (4x)"]

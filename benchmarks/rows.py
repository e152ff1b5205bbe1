"""Time and memory of checking a large file of made pairs, the first time and from the cache.

    python -m benchmarks.rows --rows 1000000

Every figure is of a process of its own. `check` reads, recognises, inspects, deduplicates, splits and summarises the
rows; `dpo data check` adds the survey. The rows are about 600 characters each, a tenth of them faulty or double.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    f"{first}{last}" for first in ("sea", "hill", "rain", "stone", "light") for last in ("ing", "ed", "s", "er", "")
]


def write_rows(file: Path, rows: int) -> None:
    """Write pairs; every tenth is a duplicate, a tie or has an empty completion."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        line = ""
        for n in range(rows):
            texts = [" ".join(draw.choices(WORDS, k=draw.randint(10, 50))) for _ in range(3)]
            row = {"prompt": f"{texts[0]} {n}", "chosen": texts[1], "rejected": texts[2]}
            if n % 30 == 11:
                row["chosen"] = ""
            if n % 30 == 22:
                row["rejected"] = row["chosen"]
            line = line if n % 30 == 1 else json.dumps(row)
            stream.write(line + "\n")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--in-process", metavar="FILE", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.in_process:
        _measure(given.in_process)
        return
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "rows.jsonl"
        write_rows(file, given.rows)
        print(f"{given.rows} rows, {file.stat().st_size / 2**20:.0f} MiB")
        environment = {"DPO_LAB_CACHE": str(Path(place) / "cache")}
        for name in ("check", "again, from the cache"):
            _timed(name, ["-m", "benchmarks.rows", "--in-process", str(file)], environment)
        _timed("dpo data check", ["-m", "dpo.cli", "data", "check", str(file)], environment)


def _timed(name: str, arguments: list[str], environment: dict[str, str]) -> None:
    import os
    import resource

    began = time.monotonic()
    subprocess.run([sys.executable, *arguments], check=True, env={**os.environ, **environment}, stdout=sys.stderr)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10  # the largest child so far
    print(f"{name}: {time.monotonic() - began:.0f} s, largest process so far {peak:.0f} MiB")


def _measure(file: str) -> None:
    from dpo.data import DataConfig, check

    checked = check(DataConfig(train=file))
    print(len(checked.train), len(checked.eval), checked.report.total_dropped)


if __name__ == "__main__":
    main()

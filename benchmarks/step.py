"""One preference step, ours and the installed TRL's side by side: `python -m benchmarks.step --help`."""

import argparse
import importlib.util
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from benchmarks import growth
from benchmarks.report import ROOT, Machine, Result, document, markdown, step_table
from benchmarks.scenarios import HH_MAX_LENGTH, SHAPES, batches, derive, in_pairs, read_pairs, to_rows
from benchmarks.turns import BenchmarkError, Job, take_turns
from benchmarks.workers import PAIR_VARIANTS, RANKING_VARIANTS
from dpo.data import Example
from dpo.errors import DPOError, nearest
from dpo.model.base import ModelConfig, load_tokenizer
from dpo.model.embedded import fetch_embedded
from dpo.model.views import tokens

GROWTH = "growth"
COMMAND = (sys.executable, "-m", "benchmarks.workers")
DATA = ROOT.parent / "shared" / "data" / "hh_harmless_dev.jsonl.gz"
DEFAULT_PAIRS = ("ours", "trl-default", "trl-best")
DEFAULT_RANKINGS = ("ours", "ours-padded")


@final
@dataclass(frozen=True)
class Bench:
    """What all measurements of one command share."""

    model: str
    data: str
    pairs: Sequence[Example]
    batch: int
    warmup: int
    rounds: int
    peak_tflops: float | None
    logs: Path

    def section(self, scenario: str, variants: Sequence[str] | None) -> str:
        """Measure one scenario and return its part of the report."""
        if scenario == GROWTH:
            return self._growth()
        shape = SHAPES[scenario]
        known, usual = (PAIR_VARIANTS, DEFAULT_PAIRS) if _is_pairs(scenario) else (RANKING_VARIANTS, DEFAULT_RANKINGS)
        names = [name for name in variants or usual if name in known]
        steps = self.warmup + self.rounds
        examples, size = derive(self.pairs, shape, self.batch * steps), self.batch
        if shape is not None and shape.completions > 2 and not shape.ranked:
            examples, size = in_pairs(examples, self.batch), self.batch * shape.pairs
        jobs = [Job(name, self.model, size, self.warmup, self.rounds, rows=to_rows(examples)) for name in names]
        timed = [tokens(batch) for batch in batches(examples, size)[self.warmup :]]
        results = take_turns(jobs, COMMAND, timed, self._logs(scenario), _environment())
        kind = "pairs a step" if _is_pairs(scenario) else "prompts a step (forward and backward pass only)"
        says = f"{size} {kind}, {sum(timed) / self.rounds:.0f} tokens, {self.rounds} rounds"
        return f"## {scenario}\n\n{says}\n\n{markdown(step_table(results, self.peak_tflops))}"

    def _growth(self) -> str:
        def measure(job: Job) -> Result:
            return take_turns([job], COMMAND, (), self._logs(GROWTH), _environment())[0]

        shared: dict[str, Any] = {"batch": self.batch, "warmup": self.warmup, "rounds": self.rounds}
        data = growth.data_table(measure, self.model, self.data, **shared)
        lengths = growth.length_table(measure, self.model, self.pairs, **shared)
        return f"## {GROWTH}\n\nours alone\n\n{markdown(data)}\n\n{markdown(lengths)}"

    def _logs(self, scenario: str) -> Path:
        folder = self.logs / scenario
        folder.mkdir(exist_ok=True)
        return folder


def _is_pairs(scenario: str) -> bool:
    shape = SHAPES[scenario]
    return shape is None or not shape.ranked


def _environment() -> dict[str, str]:
    """Return the workers' environment: this one's, one GPU, no network, no progress bars."""
    fixed = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {"CUDA_VISIBLE_DEVICES": "0", **os.environ, **fixed, "PYTHONPATH": str(ROOT)}


def _chosen(option: str, given: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise BenchmarkError(f"{option}: got {name!r}, expected some of {', '.join(known)}.{nearest(name, known)}")
    if not names:
        raise BenchmarkError(f"{option}: got no name, expected some of {', '.join(known)}. Name at least one.")
    return names


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description="Time one preference step, ours and TRL's in turns, on the same pairs, model, LoRA and dtype.",
        epilog="Example: python -m benchmarks.step --scenarios hh,long,short,k4 --rounds 5 --write",
    )
    known = ", ".join([*SHAPES, GROWTH])
    parser.add_argument("--scenarios", default=",".join(SHAPES), help=f"some of {known} (default: all but the last)")
    parser.add_argument("--variants", help=f"some of {', '.join(PAIR_VARIANTS)}; the first is compared with the others")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each variant")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each variant before the first timed one")
    parser.add_argument("--batch", type=int, default=4, help="examples a step")
    parser.add_argument("--data", default=str(DATA), help="a file of preference pairs")
    parser.add_argument("--model", help="a folder in transformers' format (default: the embedded SmolLM2-135M)")
    parser.add_argument("--peak-tflops", type=float, help="the device's peak: adds the model FLOP utilisation")
    parser.add_argument("--write", nargs="?", const="", metavar="FILE", help="(benchmarks/results/DATE-MACHINE.md)")
    found = parser.parse_args(given)
    for name in ("rounds", "warmup", "batch"):
        if getattr(found, name) < 1:
            parser.error(f"--{name}: got {getattr(found, name)}, expected at least 1")
    return found


def _check(arguments: argparse.Namespace) -> tuple[list[str], list[str] | None]:
    """Return scenarios and variants.

    Raises:
        BenchmarkError: a name is unknown, the data are absent, or TRL is wanted and not installed.
    """
    scenarios = _chosen("--scenarios", arguments.scenarios, [*SHAPES, GROWTH])
    variants = None if arguments.variants is None else _chosen("--variants", arguments.variants, list(PAIR_VARIANTS))
    if not Path(arguments.data).is_file():
        raise BenchmarkError(f"--data: {arguments.data} is no file, expected preference pairs. Give a file of them.")
    for scenario in scenarios:
        if scenario == GROWTH or variants is None:
            continue
        if not set(variants) & set(PAIR_VARIANTS if _is_pairs(scenario) else RANKING_VARIANTS):
            raise BenchmarkError(
                f"--variants: got {', '.join(variants)}, none of which can do {scenario}, expected some of "
                f"{', '.join(RANKING_VARIANTS)} there. Name one, or leave {scenario} out."
            )
    pairs = [scenario for scenario in scenarios if scenario != GROWTH and _is_pairs(scenario)]
    trl = [name for name in variants or DEFAULT_PAIRS if name.startswith("trl")]
    if pairs and trl and importlib.util.find_spec("trl") is None:
        raise BenchmarkError(
            f"--variants: {', '.join(trl)} need TRL, which is not installed. In an environment of its own: "
            'pip install -c constraints.txt -e ".[benchmark]"; or name others with --variants.'
        )
    return scenarios, variants


def main(given: Sequence[str]) -> None:
    """Measure, print the tables as they are done, and write the file where one is asked for.

    Raises:
        DPOError: something is missing, or a worker failed.
    """
    arguments = _arguments(given)
    scenarios, variants = _check(arguments)
    model = arguments.model or str(fetch_embedded())
    tokenizer = load_tokenizer(ModelConfig(name=model))
    pairs = read_pairs(arguments.data, tokenizer, HH_MAX_LENGTH)
    machine, sections = Machine.here(), []
    print("\n".join(machine.lines()), flush=True)
    with tempfile.TemporaryDirectory(prefix="dpo-lab-benchmark-") as logs:
        bench = Bench(
            model=model,
            data=arguments.data,
            pairs=pairs,
            batch=arguments.batch,
            warmup=arguments.warmup,
            rounds=arguments.rounds,
            peak_tflops=arguments.peak_tflops,
            logs=Path(logs),
        )
        for scenario in scenarios:
            sections.append(bench.section(scenario, variants))
            print(f"\n{sections[-1]}", flush=True)
    if arguments.write is not None:
        usual = ROOT / "benchmarks" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-{machine.slug}.md"
        file = Path(arguments.write) if arguments.write else usual
        file.parent.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["python", "-m", "benchmarks.step", *given])
        file.write_text(document("One preference step", machine, command, sections), encoding="utf-8")
        print(f"\nwritten: {file}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DPOError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

"""Take each protection out of a copy of the tree and see a test fail: `python -m tests.mutations [ROW ...]`.

What it prints stands in docs/reliability.md. It exits with 1 where no test noticed, where a test fails on the tree as
it is, or where the text of a protection is no longer there exactly once. Some ten seconds a row.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

ROOT = Path(__file__).parents[1]
SECONDS = 60
"""Longest run of the tests of one mutation: without its protection a test may never end."""

_LEFT_OUT = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "*.egg-info", "runs", "build", ".venv", "venv")

Outcome = Literal["caught", "caught (it did not end)", "MISSED", "NOT FOUND ONCE"]


@final
@dataclass(frozen=True)
class Mutation:
    """One protection taken out."""

    row: int
    """Of the table in docs/reliability.md."""
    what: str
    """What is taken out, in words."""
    file: str
    old: str
    """Text that stands in the file exactly once."""
    new: str
    tests: str
    """Node id of a test, or of a class or a function with parameters, that must fail then."""


CHECKPOINT, RUN, TRAIN, SETTINGS = "dpo/checkpoint.py", "dpo/run.py", "dpo/train.py", "dpo/settings.py"
SAVED, TRAINED, FAULTS = "tests/dpo/test_checkpoint.py", "tests/dpo/test_train.py", "tests/data/test_faults.py"
SECURITY = "tests/dpo/test_security.py"

MUTATIONS = (
    Mutation(
        1,
        "random states are restored",
        TRAIN,
        'checkpoint.restore_rng(point.tensors("random"), self.model.device)',
        "pass",
        f"{TRAINED}::test_a_resumed_run_is_bit_for_bit_the_unbroken_one",
    ),
    Mutation(
        2,
        "the rename is forced to disk before older ones go",
        CHECKPOINT,
        "            _sync(root)\n            _read_back(target)",
        "            _read_back(target)",
        f"{SAVED}::test_everything_is_forced_to_disk_before_the_rename_and_the_rename_before_the_prune",
    ),
    Mutation(
        3,
        "a file's hash is compared",
        CHECKPOINT,
        "if (digest := hash_file(file)) != sha256:",
        "if (digest := sha256) != sha256:",
        f"{SAVED}::test_damage_is_named_and_costs_one_checkpoint",
    ),
    Mutation(
        4,
        "a missing file is damage",
        CHECKPOINT,
        '        raise _damaged(folder, name, "is missing")',
        "        return",
        f"{SAVED}::test_damage_is_named_and_costs_one_checkpoint",
    ),
    Mutation(
        5,
        "all damaged is an error, no start from 0",
        CHECKPOINT,
        "    if skipped:\n        reasons",
        "    if False:\n        reasons",
        f"{SAVED}::test_all_damaged_is_an_error_that_names_each_never_a_start_from_zero",
    ),
    Mutation(
        6,
        "a folder with other settings is refused",
        RUN,
        "_refuse_another_run(stage, stage.folder)",
        "pass",
        "tests/dpo/test_run.py::test_a_folder_with_other_settings_is_refused_and_left_as_it_is",
    ),
    Mutation(
        8,
        "older ones go only after the new one is read back",
        CHECKPOINT,
        "            _sync(root)\n            _read_back(target)\n",
        "            _sync(root)\n            _prune(root, target, keep)\n            _read_back(target)\n",
        f"{SAVED}::test_with_keep_1_the_old_one_goes_only_after_the_new_one_is_read_back",
    ),
    Mutation(
        11,
        "the lock on the folder",
        RUN,
        "        lock.acquire()\n",
        "",
        "tests/dpo/test_run.py::test_one_process_at_a_time_trains_in_a_folder",
    ),
    Mutation(
        12,
        "a step whose numbers are not finite is skipped",
        TRAIN,
        'finite = math.isfinite(values["train/loss"]) and math.isfinite(values["grad_norm"])',
        "finite = True",
        f"{TRAINED}::test_a_nan_changes_no_weight_is_counted_and_the_run_goes_on",
    ),
    Mutation(
        14,
        "an adapter's values are looked at",
        "dpo/model/base.py",
        "if not tensors.get_tensor(key).isfinite().all():",
        "if False:",
        "tests/dpo/model/test_base.py",
    ),
    Mutation(
        17,
        "bytes are decoded strictly",
        "data/read.py",
        'b"").decode()',
        'b"").decode(errors="replace")',
        f"{FAULTS}::TestRow17Files",
    ),
    Mutation(
        17,
        "a key stands once in a row",
        "data/read.py",
        "if len(values) < len(pairs):",
        "if False:",
        f"{FAULTS}::TestRow17Files",
    ),
    Mutation(
        18,
        "an empty completion is dropped",
        "data/check.py",
        'if "" in texts:',
        "if False:",
        f"{FAULTS}::TestRow18Nothing",
    ),
    Mutation(
        19,
        "equal completions are dropped",
        "data/check.py",
        "if len(record.completions) > 1 and len(texts) == 1:",
        "if False:",
        f"{FAULTS}::TestRow19NoPreference",
    ),
    Mutation(
        21,
        "a completion is spoken by the assistant",
        "data/parts.py",
        'if (role := messages[-1].role) != "assistant":',
        'if (role := messages[-1].role) == "nobody":',
        f"{FAULTS}::TestRow21Roles",
    ),
    Mutation(
        24,
        "a second copy is dropped",
        "data/load.py",
        "if (key := _identity(record)) in self._seen:",
        "if (key := _identity(record)) in ():",
        f"{FAULTS}::TestRow24Twice",
    ),
    Mutation(
        25,
        "what evaluates is not trained on",
        "data/load.py",
        "if prompt in self.held_out:",
        "if prompt in ():",
        f"{FAULTS}::TestRow25Leaks",
    ),
    Mutation(
        26,
        "a spelled special token stays text",
        "data/render.py",
        "split_special_tokens=spelled,",
        "split_special_tokens=False,",
        f"{FAULTS}::TestRow26SpelledTokens",
    ),
    Mutation(
        27,
        "a template must be prefix-stable",
        "data/render.py",
        "if written.startswith(prompt_text):",
        "if True:",
        f"{FAULTS}::TestRow27Templates",
    ),
    Mutation(
        34,
        "weights are safetensors alone",
        "dpo/model/base.py",
        "        use_safetensors=True,",
        "        use_safetensors=None,",
        f"{SECURITY}::TestRow34Pickle",
    ),
    Mutation(
        35,
        "a model's own code is not run",
        "dpo/model/base.py",
        "trust_remote_code=False",
        "trust_remote_code=True",
        f"{SECURITY}::TestRow35RemoteCode",
    ),
    Mutation(
        36,
        "no link leads out of a run's folder",
        RUN,
        "        _refuse_links_out(folder)\n",
        "",
        f"{SECURITY}::TestRow36Paths",
    ),
    Mutation(
        37,
        "a template's time is bounded",
        "data/limits.py",
        "            signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _AGAIN)\n",
        "            pass\n",
        f"{SECURITY}::TestRow37Templates::test_one_without_end_is_stopped",
    ),
    Mutation(
        37,
        "what a template writes is bounded",
        "data/render.py",
        "if len(text) > _FRAME + _GROWTH * given:",
        "if False:",
        f"{SECURITY}::TestRow37Templates::test_one_that_writes_too_much_is_refused",
    ),
    Mutation(
        38,
        "aliases are refused",
        SETTINGS,
        "if isinstance(event, yaml.AliasEvent):",
        "if False:",
        f"{SECURITY}::TestRow38Yaml",
    ),
    Mutation(
        38,
        "a run file has a size",
        SETTINGS,
        "if len(text) > LONGEST:",
        "if False:",
        f"{SECURITY}::TestRow38Yaml",
    ),
    Mutation(
        39,
        "values in pages are escaped",
        "dpo/evaluation/report/template.py",
        "autoescape=True",
        "autoescape=False",
        f"{SECURITY}::TestRow39Pages",
    ),
    Mutation(
        40,
        "secrets of the environment are hidden",
        "dpo/redact.py",
        "        text = text.replace(secret, _HIDDEN)\n",
        "        pass\n",
        "tests/dpo/test_redact.py",
    ),
    Mutation(
        40,
        "a key in a setting is refused",
        SETTINGS,
        "if holds_secret(str(value)):",
        "if False:",
        f"{SECURITY}::TestRow40Secrets",
    ),
    Mutation(
        41,
        "tests open no socket",
        "pyproject.toml",
        '"--disable-socket", ',
        "",
        f"{SECURITY}::TestRow41Network",
    ),
)


def main(rows: list[str]) -> int:
    """Print the table; return the exit code."""
    chosen = [one for one in MUTATIONS if not rows or str(one.row) in rows]
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        copy = shutil.copytree(ROOT, Path(scratch) / "tree", symlinks=True, ignore=_LEFT_OUT)
        _check_copy(copy)
        if _run(copy, *dict.fromkeys(one.tests for one in chosen)) != "MISSED":
            print("A test fails with every protection in its place.", file=sys.stderr)
            return 1
        print("| row | taken out | test | outcome |\n|---|---|---|---|")
        outcomes = [_try(copy, one) for one in chosen]
    return int(not {"MISSED", "NOT FOUND ONCE"}.isdisjoint(outcomes))


def _try(copy: Path, one: Mutation) -> Outcome:
    outcome: Outcome
    file = copy / one.file
    whole = file.read_text(encoding="utf-8")
    if whole.count(one.old) != 1:
        outcome = "NOT FOUND ONCE"
    else:
        file.write_text(whole.replace(one.old, one.new), encoding="utf-8")
        outcome = _run(copy, one.tests)
        file.write_text(whole, encoding="utf-8")
    print(f"| {one.row} | {one.what} | `{one.tests.removeprefix('tests/')}` | {outcome} |", flush=True)
    return outcome


def _environment(copy: Path) -> dict[str, str]:
    # In front of the installed package, which is the tree that is not to be changed.
    return {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}


def _check_copy(copy: Path) -> None:
    """Make sure that tests in the copy import the copy, its linked folders too."""
    code = "import sys, dpo.settings; print(*(sys.modules[one].__file__ for one in ('dpo.settings', 'dpo.data.read')))"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, env=_environment(copy), capture_output=True, text=True, check=False
    )
    if told.returncode:
        raise SystemExit(told.stderr)
    if not all(one.startswith(str(copy)) for one in told.stdout.split()):
        raise SystemExit(f"{copy}: got {told.stdout.strip()}, expected the modules of the copy.")


def _run(copy: Path, *tests: str) -> Outcome:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command,
            cwd=copy,
            env=_environment(copy),
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS * len(tests),
        )
    except subprocess.TimeoutExpired:
        return "caught (it did not end)"
    if done.returncode not in (0, 1):  # neither passed nor failed: nothing was collected, or it cannot be imported
        raise SystemExit(
            f"{' '.join(tests)}: pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
        )
    return "MISSED" if done.returncode == 0 else "caught"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

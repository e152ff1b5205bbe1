"""A run killed with signal 9, at every step and at every kind of place within a save, ends in the unbroken run's bytes.

One process imports everything and forks a child for every start, so that a start costs a fraction of a second.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dpo import recipes
from dpo.metrics import read
from dpo.model.base import ModelConfig
from dpo.settings import plan, read_overrides

STEPS = 10

SCRIPT = """
import json, os, shutil, signal, sys
from pathlib import Path
import accelerate, peft, torch
from dpo import checkpoint, mirror
from dpo.data import check
from dpo.metrics import Ledger
from dpo.model.base import load_base
from dpo.run import execute
from dpo.settings import read_run

torch.set_num_threads(1)
home, points = Path(sys.argv[1]), json.loads(sys.argv[2])
(run,) = read_run(home / "asked.yaml", {})
base, checked = load_base(run.model), check(run.data)

def die_after(owner, name, when):
    honest = getattr(owner, name)
    def mortal(*arguments, **options):
        result = honest(*arguments, **options)
        if when(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, mortal)

def of(step):
    return lambda path, *rest: f"step-{step:08d}" in str(path)

def arm(place, step):
    match place:
        case "row":
            die_after(Ledger, "append", lambda ledger, at, kind, *rest: (at, kind) == (step, "train"))
        case "optimizer":
            die_after(checkpoint, "save_file", lambda group, path: of(step)(path) and path.name.startswith("optimizer"))
        case "manifest":
            die_after(checkpoint, "_write", of(step))
        case "rename":
            die_after(os, "rename", lambda source, target: Path(target).name == f"step-{step:08d}")
        case "read back":
            die_after(checkpoint, "_read_back", of(step))
        case "pruned by half":
            honest = shutil.rmtree
            def half(path, *rest, **options):
                if Path(path).name.startswith(".tmp-step"):
                    (path / "state.json").unlink()
                    os.kill(os.getpid(), signal.SIGKILL)
                honest(path, *rest, **options)
            shutil.rmtree = half

def start(folder, *point):
    child = os.fork()
    if child == 0:
        try:
            arm(*point) if point else None
            execute([run.override({"output": {"dir": str(folder)}})], "kills", base=base, checked=checked)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]

assert start(home / "whole") == 0
for point in points:
    status = start(home / "broken", *point)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
assert start(home / "broken") == 0
"""


def killed_at(
    points: Sequence[tuple[str, int]], home: Path, recipe: str, config: ModelConfig, pairs: Path, *more: str
) -> None:
    """Start a run again and again, killed at each point in turn; compare it with one that nothing came between."""
    given = [f"data.train={pairs}", "data.eval_share=0", f"model.name={config.name}", "model.dtype=float32"]
    given += ["model.device=cpu", "model.lora.r=4", f"loop.max_steps={STEPS}", "loop.num_train_epochs=9"]
    given += ["loop.per_device_train_batch_size=4", "loop.gradient_accumulation_steps=1", "evaluation.max_prompts=0"]
    (run,) = plan(recipes.find(recipe), read_overrides([*given, "loop.save_steps=2", *more]))
    (home / "asked.yaml").write_text(run.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-c", SCRIPT, str(home), json.dumps(points)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    last = f"checkpoints/step-{STEPS:08d}"
    for name in ("adapter/adapter_model.safetensors", f"{last}/optimizer.safetensors", "metrics.jsonl"):
        assert (home / "broken" / name).read_bytes() == (home / "whole" / name).read_bytes(), name
    assert len(read(home / "whole" / "metrics.jsonl")) == STEPS


@pytest.mark.faults
def test_killed_at_any_step_and_within_a_save(
    tmp_path: Path, tiny_config: ModelConfig, pairs_file: Callable[..., Path]
) -> None:
    """Of 26 pairs 7 batches are an epoch: steps 8 to 10 are of the next. Only one checkpoint is kept."""
    pairs = pairs_file(tmp_path / "pairs.jsonl", prompts=26)
    places = {2: "optimizer", 4: "manifest", 6: "rename", 8: "pruned by half", 10: "read back"}
    points: list[tuple[str, int]] = []
    for step in range(1, STEPS + 1):
        points += [("row", step), *([(places[step], step)] if step in places else [])]
    killed_at(points, tmp_path, "dpo", tiny_config, pairs, "model.lora.dropout=0.1", "loop.save_total_limit=1")


@pytest.mark.faults
@pytest.mark.slow
def test_killed_between_sampling_and_learning(
    tmp_path: Path, tiny_config: ModelConfig, pairs_file: Callable[..., Path]
) -> None:
    """PPO: a rollout is four steps, and a checkpoint is written in the middle of one; weights, value and KL follow."""
    pairs = pairs_file(tmp_path / "pairs.jsonl", prompts=26)
    more = ["rollout.rewards=[dpo.data.gold:sentiment]", "rollout.prompts_per_rollout=8", "rollout.epochs=2"]
    more += ["rollout.max_new_tokens=6", "rollout.value=null", "ppo.objective.kl_target=1.0"]
    killed_at([("row", 1), ("row", 3), ("row", 5), ("manifest", 6)], tmp_path, "reward_ppo", tiny_config, pairs, *more)

"""The embedded default: a real 135M model, one set of preferences, four ways to learn from them, one table.

The task is controlled sentiment, the first experiment of the DPO paper (arXiv:2305.18290, section 6.1): answers sampled
from the model itself, preferences given by a known gold reward, so that the TRUE reward of every objective is known.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from dpo.checkpoint import atomic_write_text
from dpo.data import DataConfig, check
from dpo.embedded import PAIRS, RATES, embedded
from dpo.estimates import Estimate, mean
from dpo.evaluation.samples import Spoken
from dpo.model.base import load_base
from dpo.run import Result, Run, execute, measure_start
from dpo.settings import STAGE, learned_reward, merged

SAMPLES_SHOWN = 3


@dataclass(frozen=True)
class Size:
    """How much of the task is done."""

    steps: int
    """Optimiser steps, each over the two completions of 8 pairs, whatever the objective."""
    rate: float
    """Multiplies every learning rate: fewer steps are larger ones."""
    prompts: int
    """Held-out prompts that are answered before and after."""
    samples_per_prompt: int
    eval_share: float
    """Share of the training prompts whose pairs are held out."""
    reward_steps: int
    """Optimiser steps of the reward model, 8 pairs each."""
    rollouts: int
    """Rounds of sampling in which PPO learns through it."""


FULL = Size(steps=32, rate=1.0, prompts=60, samples_per_prompt=2, eval_share=0.1, reward_steps=96, rollouts=8)
FAST = Size(steps=12, rate=2.0, prompts=60, samples_per_prompt=1, eval_share=0.04, reward_steps=36, rollouts=2)

PROMPTS_PER_ROLLOUT = 64
"""Of PPO; each rollout is learned from twice, 16 completions a step."""
UPDATES_PER_ROLLOUT = 2 * PROMPTS_PER_ROLLOUT // 16


@dataclass(frozen=True)
class Entry:
    """One objective of the comparison. Settings tried and what came of them: docs/experiments.md."""

    objective: Mapping[str, Any]
    batch_size: int
    """Examples a step: 8 pairs, or their 16 completions judged one by one."""


ENTRIES: Mapping[str, Entry] = {
    "dpo": Entry({"name": "dpo", "beta": 0.1}, batch_size=8),
    "ipo": Entry({"name": "ipo", "tau": 0.5, "reduction": "mean"}, batch_size=8),
    "kto": Entry({"name": "kto", "beta": 0.1}, batch_size=16),
}

REWARD = Entry({"name": "bradleyterry"}, batch_size=8)
PPO = Entry({"name": "ppo", "kl_coefficient": 0.02}, batch_size=16)
"""The two stages of reward_ppo."""


def runs(size: Size, task: Mapping[str, Any], output: Path) -> dict[str, tuple[Run, ...]]:
    """Return the stages of what is compared: one start, one split; the offline ones read the same completions."""
    asked = {"max_prompts": size.prompts, "samples_per_prompt": size.samples_per_prompt}
    task = merged(task, {"data": {"eval_share": size.eval_share}, "evaluation": asked})

    def run(name: str, folder: str, entry: Entry, steps: int, rate: float = 1.0, **more: Any) -> Run:
        loop = {"max_steps": steps, "per_device_train_batch_size": entry.batch_size, "gradient_accumulation_steps": 1}
        return Run.of(
            {
                **task,
                "name": name,
                "objective": entry.objective,
                "optimiser": {"learning_rate": rate * RATES[entry.objective["name"]], "lr_scheduler_type": "linear"},
                "loop": {**loop, "num_train_epochs": 1000},  # never the limit: max_steps is
                "output": {"dir": str(output / folder)},
                **more,
            },
            place="quickstart",
        )

    planned: dict[str, tuple[Run, ...]] = {
        name: (run(name, name, entry, size.steps, size.rate),) for name, entry in ENTRIES.items()
    }
    rollout = {
        "rewards": [learned_reward().model_dump(mode="json")],
        "value": f"{STAGE}reward",
        "prompts_per_rollout": PROMPTS_PER_ROLLOUT,
        "epochs": 2,
        "max_new_tokens": 40,
    }
    planned["reward_ppo"] = (
        run("reward", "reward_ppo", REWARD, size.reward_steps),
        run("ppo", "reward_ppo", PPO, size.rollouts * UPDATES_PER_ROLLOUT, rollout=rollout),
    )
    return planned


def quickstart(fast: bool, output: Path) -> dict[str, Result]:
    """Train, compare, print the table, and write it to `output`/results.json.

    Raises:
        DPOError: whatever is wrong, with place and fix.
    """
    console = Console()
    size = FAST if fast else FULL
    with embedded() as task:
        planned = runs(size, task, output)
        console.print(
            f"Controlled sentiment: SmolLM2-135M-Instruct learns to answer positively from {PAIRS}; "
            f"{', '.join(planned)} start from one model: {size.steps} optimiser steps each, and for reward_ppo "
            f"{size.reward_steps} of the reward model and {size.rollouts} rollouts of {PROMPTS_PER_ROLLOUT} answers."
        )
        first = planned["dpo"][0]
        base = load_base(first.model)
        console.print(f"Model on {base.device}, {str(base.dtype).removeprefix('torch.')}.")
        checked = check(DataConfig.model_validate(first.data.model_dump()))
        before = measure_start(first, base, checked).spoken
        assert before is not None
        done = {name: execute(stages, name, base=base, checked=checked) for name, stages in planned.items()}
        results = {name: stages[-1] for name, stages in done.items()}
        judge = Estimate(**done["reward_ppo"][0].summary["measures"]["eval/reward/accuracy"])
    console.print(_table(before, results))
    for panel in _answers(before, results):
        console.print(panel)
    _write(output, before, results)
    console.print(
        "Gold reward: sentiment of the model's own answers to held-out prompts, from -1 to 1; gain: over the start, "
        "prompt by prompt; ± half of a 95 % interval; GiB: peak memory. One seed and untuned settings: this shows that "
        "each objective works, not which one is best. The reward model of reward_ppo ordered "
        f"{judge.value:.2f} ±{judge.half_width:.2f} of the held-out pairs as the gold reward does."
    )
    for name, result in results.items():
        print(f"{name}: {result.folder}")
    return results


def gain(before: Spoken, after: Spoken) -> Estimate:
    """Return the mean difference in gold reward, prompt by prompt, after minus before."""
    assert before.gold is not None
    assert after.gold is not None
    assert before.prompts == after.prompts
    return mean([a - b for a, b in zip(after.gold, before.gold, strict=True)])


def _table(before: Spoken, results: Mapping[str, Result]) -> Table:
    start = before.estimates()
    table = Table(title="One start, one split, the same completions")
    for heading in ("", "gold reward", "gain", "KL, nats", "pair accuracy", "tokens", "seconds", "GiB"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("start", _short(start["eval/gold_reward"]), "", "0", "", f"{start['eval/length'].value:.0f}", "", "")
    for name, result in results.items():
        assert result.achieved.spoken is not None
        after, measures = result.achieved.spoken.estimates(), result.summary["measures"]
        accuracy = measures.get("eval/reward/accuracy")
        table.add_row(
            name,
            _short(after["eval/gold_reward"]),
            _short(gain(before, result.achieved.spoken)),
            f"{after['kl/policy_reference'].value:.1f}",
            "" if accuracy is None else _short(Estimate(**accuracy)),
            f"{after['eval/length'].value:.0f}",
            f"{result.summary['seconds']:.0f}",
            f"{result.summary['memory_peak_bytes'] / 2**30:.2f}",
        )
    return table


def _short(estimate: Estimate) -> str:
    """Fit a terminal of 80 columns; results.json holds the intervals' ends."""
    return f"{estimate.value:.2f} ±{estimate.half_width:.2f}"


def _answers(before: Spoken, results: Mapping[str, Result]) -> list[Panel]:
    panels = []
    for i in range(min(SAMPLES_SHOWN, len(before.prompts))):
        lines = [f"[dim]start[/dim] {_plain(before.answers[i][0].text)}"]
        for name, result in results.items():
            assert result.achieved.spoken is not None
            lines.append(f"[bold]{name}[/bold] {_plain(result.achieved.spoken.answers[i][0].text)}")
        panels.append(Panel("\n".join(lines), title=_plain(before.prompts[i]), title_align="left"))
    return panels


def _plain(text: str) -> str:
    """Keep a sample from being read as console markup."""
    return text.replace("[", r"\[")


def _write(output: Path, before: Spoken, results: Mapping[str, Result]) -> None:
    written = {
        "start": {name: asdict(one) for name, one in before.estimates().items()},
        "runs": {
            name: {
                "folder": str(result.folder),
                "gain": asdict(gain(before, result.achieved.spoken)),
                **result.summary,
            }
            for name, result in results.items()
            if result.achieved.spoken is not None
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    atomic_write_text(output / "results.json", json.dumps(written, indent=2) + "\n")

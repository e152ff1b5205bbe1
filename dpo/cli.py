"""The command line: thin. Every command reads its arguments and calls one function of the rooms below."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpo.data_cli import OVERRIDES, Debug, data_app
from dpo.model_cli import model_app

if TYPE_CHECKING:
    from dpo.settings import Run

app = typer.Typer(
    help="Align a language model on one GPU: one preference dataset, any objective, an honest comparison.",
    epilog="Example: dpo train dpo data.train=prefs.jsonl (dpo quickstart needs nothing at all)",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(model_app)  # dpo export, dpo chat, dpo card


@app.command(
    name="train",
    context_settings=OVERRIDES,
    epilog="Example: dpo train ipo data.train=prefs.jsonl objective.tau=0.5 optimiser.learning_rate=1e-4",
)
def train_command(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="RECIPE|FILE", help="A recipe's name, or a YAML file of a run.")],
    plan_only: Annotated[
        bool,
        typer.Option("--plan", help="Train nothing: print the memory it would take, and what fits. Loads no data."),
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(metavar="SIZE", help="With --plan: the card to plan for, 24GB say; else this machine.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Train a recipe or a run file, with key=value (or --key=value) overrides. Run again, it goes on."""
    from dpo import recipes
    from dpo.errors import ConfigError
    from dpo.run import execute, show, speaking
    from dpo.settings import plan, read_overrides, read_run

    with speaking(debug):
        if gpu is not None and not plan_only:
            raise ConfigError(f"--gpu: got {gpu!r} without --plan, expected both. A run takes the card that is there.")
        overrides = read_overrides(context.args)
        if Path(what).suffix in (".yaml", ".yml"):
            runs = read_run(Path(what), overrides)
            name = runs[0].name
        else:
            runs, name = plan(recipes.find(what), overrides), what
        if plan_only:
            _show_plans(runs, gpu)
            return
        for result in execute(runs, name):
            show(result)


def _show_plans(runs: "Sequence[Run]", gpu: str | None) -> None:
    """Print what every stage takes on a card of size `gpu`, or on this machine."""
    from rich.console import Console

    from dpo.losses import MovesReference
    from dpo.measure import reward_roles
    from dpo.model.base import choose_device
    from dpo.model.memory import RANKED, Card, Roles, SamplingSize, plan_memory
    from dpo.settings import PREVIOUS, STAGE

    card = Card.here(choose_device(runs[0].model.device)) if gpu is None else Card.named(gpu)
    stages = {run.name: run.model for run in runs}
    for n, run in enumerate(runs):
        config, start = run.model, run.model.adapter or ""
        continues = start == PREVIOUS or start.startswith(STAGE)
        if continues:  # with an adapter of the shape that the earlier stage trains
            earlier = stages[runs[n - 1].name if start == PREVIOUS else start.removeprefix(STAGE)]
            config = run.model.model_copy(update={"adapter": earlier.adapter, "lora": earlier.lora})
        stages[run.name] = config
        objective, rollout = run.objective.build(), run.rollout
        roles = Roles(
            frozen_adapter=continues and config.reference == "start",
            moving=isinstance(objective, MovesReference),
            rewards=len(reward_roles(run)),
            value=objective.needs_values,
            reward=run.trains_reward,
        )
        longest, sampling = run.data.max_length, None
        if rollout is not None:
            at_once = min(rollout.sampling_batch_size, rollout.prompts_per_rollout * rollout.completions_per_prompt)
            sampling = SamplingSize(at_once, longest, rollout.max_new_tokens)
            longest += rollout.max_new_tokens
        planned = plan_memory(config, run.optimiser.name, card, roles, sampling)
        view = objective.view
        longest *= {"pairs": 2, "comparisons": 2, "rankings": RANKED}.get(view, 1)
        limit = run.loop.per_device_max_tokens
        examples = run.loop.per_device_train_batch_size if limit is None else max(1, limit // longest)
        if objective.needs_demonstrations:  # scored beside each completion
            longest += run.data.max_length
        unit = {"rollouts": "completions", "rankings": f"rankings of {RANKED}"}.get(view, view)
        Console().print(planned.table(card, examples, longest, unit))


@app.command(
    name="compare",
    context_settings=OVERRIDES,
    epilog="Example: dpo compare --objectives dpo,ipo,kto --seeds 3 data.train=prefs.jsonl",
)
def compare_command(
    context: typer.Context,
    objectives: Annotated[
        str, typer.Option(metavar="A,B,...", help="Recipes, objectives, or YAML files of a run.")
    ] = "dpo,ipo,kto",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each.")] = 1,
    completions: Annotated[
        int | None, typer.Option(min=1, help="Budget: completions each stage learns from (default: one pass).")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Budget in seconds of training each stage instead.")
    ] = None,
    tune: Annotated[int, typer.Option(min=0, help="Settings of learning rate and beta to try for each first.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder (default: runs/compare-HASH).")] = None,
    finished: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="DIR", help="Train nothing: the report of finished runs (repeat for several)."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Train several objectives from one start under one budget; end in one report. Run again, it goes on.

    key=value settings hold for all of them, ENTRY.key=value for one alone. Without data.train it is the embedded task.
    A language model judges the answers with judge.base_url=URL judge.model=NAME.
    """
    from dpo.compare import Wanted, read_judge, rebuild, run_comparison, show_comparison
    from dpo.run import speaking
    from dpo.settings import read_overrides

    with speaking(debug):
        overrides = read_overrides(context.args)
        judge = read_judge(overrides.pop("judge", None))
        if finished:
            show_comparison(rebuild(finished, output or finished[0], judge), output or finished[0])
            return
        names = tuple(one.strip() for one in objectives.split(",") if one.strip())
        wanted = Wanted(names, seeds, completions, seconds, tune, judge, overrides)
        show_comparison(*run_comparison(wanted, output))


@app.command(
    name="evaluate",
    epilog="Example: dpo evaluate runs/dpo-1a2b3c4d evaluation.max_prompts=64",
    context_settings=OVERRIDES,
)
def evaluate_command(
    context: typer.Context,
    what: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A finished run, a LoRA adapter, or a model (folder or hub id).")
    ],
    adverse: Annotated[
        str | None,
        typer.Option(metavar="N,M,...", help="Also train a copy on so many exchanged pairs: what is left of the run?"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure a finished run again, or any adapter or model on data.train=FILE.

    Held-out pairs, and KL, length and gold reward of its own samples; evaluation.choices, .sycophancy and .text ask for
    more.
    """
    from dpo.errors import ConfigError
    from dpo.evaluate import evaluate
    from dpo.robustness import erode, show_erosion
    from dpo.run import show, speaking
    from dpo.settings import read_overrides

    with speaking(debug):
        overrides = read_overrides(context.args)
        if adverse is None:
            show(evaluate(what, overrides))
            return
        counts = [one.strip() for one in adverse.split(",")]
        if not all(one.isdecimal() for one in counts):
            raise ConfigError(f"--adverse: got {adverse!r}, expected numbers of examples such as 10,50,100,340.")
        show_erosion(erode(Path(what), [int(one) for one in counts], overrides))


@app.command(epilog="Example: dpo objectives kto")
def objectives(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One of them, or package.module:Class of your own.")
    ] = None,
    debug: Debug = False,
) -> None:
    """List the objectives: what each one reads and does. With a NAME: its formula, paper and hyper-parameters."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dpo import losses
    from dpo.losses.describe import describe
    from dpo.run import speaking
    from dpo.settings import written

    console = Console()
    with speaking(debug):
        if name is None:
            table = Table("name", "view", "reference", "what it does")
            for one in map(describe, losses.names()):
                table.add_row(one.name, one.view, "yes" if one.needs_reference else "no", Text(one.summary))
            console.print(table)
            print("One of them in full: dpo objectives NAME. To train with it: dpo train NAME data.train=FILE.")
            return
        one = describe(name)
        reference = "needs a reference" if one.needs_reference else "needs no reference"
        console.print(Text(f"{one.name}: {one.summary}\n\n{one.text}\n\nReads {one.view}, {reference}."))
        if one.parameters:
            table = Table("hyper-parameter", "default", "meaning")
            for parameter in one.parameters:
                default = "required" if parameter.required else written(parameter.default)
                table.add_row(f"objective.{parameter.name}", Text(default), Text(parameter.text))
            console.print(table)


@app.command(epilog="Example: dpo quickstart --fast")
def quickstart(
    fast: Annotated[bool, typer.Option("--fast", help="About 6 minutes on 2 CPU cores instead of about 14.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the runs (default: runs/quickstart, or runs/quickstart-fast).")
    ] = None,
    debug: Debug = False,
) -> None:
    """Train a real 135M model with DPO, IPO, KTO and PPO on the same preferences; compare what each achieved."""
    from dpo.quickstart import quickstart as go
    from dpo.run import speaking

    with speaking(debug):
        go(fast=fast, output=output or Path("runs") / ("quickstart-fast" if fast else "quickstart"))


def main() -> None:
    """Run the command line."""
    app(args=sys.argv[1:], prog_name="dpo")


if __name__ == "__main__":
    main()

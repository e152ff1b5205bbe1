"""The command line: thin. Every command reads its arguments and calls one function of the rooms below."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Align a language model on one GPU: one preference dataset, any objective, an honest comparison.",
    epilog="Example: dpo train dpo data.train=prefs.jsonl (dpo quickstart needs nothing at all)",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(
    help="Look at a preference dataset before it trains.",
    epilog="Example: dpo data check prefs.jsonl",
    no_args_is_help=True,
)
app.add_typer(data_app, name="data")

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command(
    name="train",
    context_settings=OVERRIDES,
    epilog="Example: dpo train ipo data.train=prefs.jsonl objective.tau=0.5 optimiser.learning_rate=1e-4",
)
def train_command(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="RECIPE|FILE", help="A recipe's name, or a YAML file of a run.")],
    debug: Debug = False,
) -> None:
    """Train a recipe or a run file, with key=value (or --key=value) overrides. Run again, it goes on."""
    from dpo import recipes
    from dpo.run import execute, show, speaking
    from dpo.settings import plan, read_overrides, read_run

    with speaking(debug):
        overrides = read_overrides(context.args)
        if Path(what).suffix in (".yaml", ".yml"):
            runs = read_run(Path(what), overrides)
            name = runs[0].name
        else:
            runs, name = plan(recipes.find(what), overrides), what
        for result in execute(runs, name):
            show(result)


@app.command(epilog="Example: dpo evaluate runs/dpo-1a2b3c4d evaluation.max_prompts=64", context_settings=OVERRIDES)
def evaluate(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    debug: Debug = False,
) -> None:
    """Measure a finished run again: held-out pair accuracy, and KL, length and gold reward of its own samples."""
    from dpo.run import evaluate_run, show, speaking
    from dpo.settings import read_overrides

    with speaking(debug):
        show(evaluate_run(folder, read_overrides(context.args)))


@data_app.command(name="check", context_settings=OVERRIDES, epilog="Example: dpo data check prefs.jsonl max_length=512")
def data_check(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file, or owner/name of a hub dataset.")],
    debug: Debug = False,
) -> None:
    """Say what a dataset holds, which rows would be dropped and why. No model is loaded."""
    from pydantic import ValidationError
    from rich.console import Console

    from dpo.data import DataConfig, check
    from dpo.errors import ConfigError
    from dpo.run import speaking
    from dpo.settings import explained, read_overrides

    with speaking(debug):
        try:
            config = DataConfig.model_validate({"train": file, **read_overrides(context.args)})
        except ValidationError as error:
            raise ConfigError(explained(error, DataConfig)) from error
        Console().print(check(config).report)


@app.command(epilog="Example: dpo quickstart --fast")
def quickstart(
    fast: Annotated[bool, typer.Option("--fast", help="About 2 minutes on 2 CPU cores instead of about 10.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the runs (default: runs/quickstart, or runs/quickstart-fast).")
    ] = None,
    debug: Debug = False,
) -> None:
    """Train a real 135M model with DPO, IPO and KTO on the same preferences, and compare what each achieved."""
    from dpo.quickstart import quickstart as go
    from dpo.run import speaking

    with speaking(debug):
        go(fast=fast, output=output or Path("runs") / ("quickstart-fast" if fast else "quickstart"))


def main() -> None:
    """Run the command line."""
    app(args=sys.argv[1:], prog_name="dpo")


if __name__ == "__main__":
    main()

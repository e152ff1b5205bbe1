"""`dpo data`: look at a preference dataset, walk through it, and write it in this project's own format."""

import random
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dpo.data import DataConfig

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Dataset = Annotated[str, typer.Argument(metavar="FILE", help="A file, or owner/name of a hub dataset.")]

IN_A_PIPE = 10
"""Records that `dpo data show` prints where nobody can press a key."""

data_app = typer.Typer(
    help="Look at a preference dataset before it trains.",
    epilog="Example: dpo data check prefs.jsonl",
    no_args_is_help=True,
)


@data_app.command(
    name="check",
    context_settings=OVERRIDES,
    epilog="Example: dpo data check prefs.jsonl max_length=512 --tokenizer gpt2",
)
def data_check(
    context: typer.Context,
    file: Dataset,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also look at the tokens: a model's folder or hub id.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write the account as a page as well.")] = None,
    debug: Debug = False,
) -> None:
    """Say what a dataset holds, what is wrong with it and what to do about it. No model is loaded.

    Settings of the data follow as key=value: columns, label, eval, max_length, ...
    """
    from rich.console import Console

    from dpo.data import check
    from dpo.data.survey import survey
    from dpo.evaluation.report.dataset import check_page, write
    from dpo.evaluation.report.terminal import show_survey
    from dpo.model.base import ModelConfig, load_tokenizer
    from dpo.run import speaking

    with speaking(debug):
        config = _config(file, context.args)
        if html is not None:
            check_page(html)
        loaded = None if tokenizer is None else load_tokenizer(ModelConfig(name=tokenizer))
        found = survey(check(config), loaded)
        show_survey(found, Console(), config.overlong)
        if html is not None:
            write(found, html, config.overlong)
            print(f"The page: {html}")


@data_app.command(
    name="show", context_settings=OVERRIDES, epilog="Example: dpo data show prefs.jsonl --from 100 --count 3"
)
def data_show(
    context: typer.Context,
    file: Dataset,
    start: Annotated[int, typer.Option("--from", min=1, metavar="N", help="Begin with the N-th kept record.")] = 1,
    count: Annotated[
        int | None, typer.Option(min=1, metavar="K", help=f"Show K records (in a pipe {IN_A_PIPE} by default).")
    ] = None,
    shuffled: Annotated[
        int | None, typer.Option("--random", metavar="SEED", help="In an order that SEED draws.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Walk through the records as training will see them: Enter shows the next, q stops."""
    from rich.console import Console

    from dpo.data import check
    from dpo.errors import DataError
    from dpo.evaluation.report.terminal import record_view
    from dpo.run import speaking

    with speaking(debug):
        records = check(_config(file, context.args, whole=True)).train
        if start > len(records):
            raise DataError(f"--from: got {start}, expected at most {len(records)}: so many records were kept.")
        order: Sequence[int] = range(len(records))
        if shuffled is not None:
            order = random.Random(shuffled).sample(order, len(order))  # noqa: S311  (an order to read in, no secret)
        by_hand = _by_hand()
        most = count if by_hand or count is not None else IN_A_PIPE
        console = Console()
        for n, place in enumerate(islice(order, start - 1, None if most is None else start - 1 + most)):
            if by_hand and n and not _next():
                break
            console.print(record_view(records[place], place + 1, len(records)), soft_wrap=not by_hand)


@data_app.command(
    name="convert", context_settings=OVERRIDES, epilog="Example: dpo data convert hh.jsonl.gz prefs.parquet"
)
def data_convert(
    context: typer.Context,
    file: Dataset,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A file ending in .jsonl or .parquet.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    debug: Debug = False,
) -> None:
    """Write the records of any known dataset in this project's own format; say which rows were left out."""
    from rich.console import Console

    from dpo.data import check
    from dpo.data.write import check_target, write
    from dpo.errors import DataError
    from dpo.run import speaking

    with speaking(debug):
        config = _config(file, context.args, whole=True)
        check_target(out, force)
        if out.exists() and Path(file).exists() and out.samefile(file):
            raise DataError(f"{out}: is the file that is read, expected another. Give the converted file its own name.")
        checked = check(config)
        written = write(checked.train, out, force)
        Console().print(checked.report)
        print(f"{written:,} records: {out}")


def _config(file: str, arguments: Sequence[str], whole: bool = False) -> "DataConfig":
    """Return the settings of the data; `whole` keeps all records on one side."""
    from pydantic import ValidationError

    from dpo.data import DataConfig
    from dpo.errors import ConfigError
    from dpo.settings import explained, read_overrides

    given: Mapping[str, Any] = read_overrides(arguments)
    if whole:
        if sides := {"eval", "eval_share"} & set(given):
            raise ConfigError(f"{min(sides)}: this command reads one set as a whole. Leave it out.")
        given = {"eval_share": 0, **given}
    try:
        return DataConfig.model_validate({"train": file, **given})
    except ValidationError as error:
        raise ConfigError(explained(error, DataConfig)) from error


def _by_hand() -> bool:
    """Tell whether somebody reads and can press a key."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _next() -> bool:
    """Ask on the terminal; the end of the input stops as well."""
    try:
        return not input("Enter: next, q: stop ").strip().lower().startswith("q")
    except EOFError:
        return False

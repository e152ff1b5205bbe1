"""IPO: a squared distance to a finite margin, on preference pairs. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def ipo(data: DataConfig) -> tuple[Run, ...]:
    """One stage: IPO on mean log-ratios, tau 0.5: a target margin of 1 nat a token, which can be reached."""
    return one_stage("ipo", data, tau=0.5, reduction="mean", learning_rate=1e-4)


if __name__ == "__main__":
    main(ipo)

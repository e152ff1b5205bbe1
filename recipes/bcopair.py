"""BCO on pairs: a classifier of chosen against rejected. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def bcopair(data: DataConfig) -> tuple[Run, ...]:
    """One stage: BCO on pairs, beta 0.1; half of DPO's rate, as in Jung et al. 2024 (5e-7)."""
    return one_stage("bcopair", data, beta=0.1, learning_rate=5e-5)


if __name__ == "__main__":
    main(bcopair)

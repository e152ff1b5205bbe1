"""BCO: a classifier of single completions, each judged desirable or not. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def bco(data: DataConfig) -> tuple[Run, ...]:
    """One stage: BCO, beta 0.1; half of DPO's rate, as in Jung et al. 2024 (5e-7)."""
    return one_stage("bco", data, beta=0.1, learning_rate=5e-5)


if __name__ == "__main__":
    main(bco)

"""The hinge loss on preference pairs. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def hinge(data: DataConfig) -> tuple[Run, ...]:
    """One stage: the hinge, beta 0.05 (Liu et al. 2023); DPO's rate."""
    return one_stage("hinge", data, beta=0.05, learning_rate=1e-4)


if __name__ == "__main__":
    main(hinge)

"""Robust DPO: DPO corrected for reversed labels. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def robustdpo(data: DataConfig) -> tuple[Run, ...]:
    """One stage: robust DPO, beta 0.1, 10 % of the labels reversed; DPO's rate."""
    return one_stage("robustdpo", data, beta=0.1, label_smoothing=0.1, learning_rate=1e-4)


if __name__ == "__main__":
    main(robustdpo)

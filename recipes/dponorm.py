"""Length-normalised DPO: log-ratios per token. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def dponorm(data: DataConfig) -> tuple[Run, ...]:
    """One stage: DPO on log-ratios per token, beta 5; half of DPO's rate, as in Lambert et al. 2024 (5e-7)."""
    return one_stage("dponorm", data, beta=5.0, learning_rate=5e-5)


if __name__ == "__main__":
    main(dponorm)

"""APO-zero: for chosen completions better than the model's own. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def apozero(data: DataConfig) -> tuple[Run, ...]:
    """One stage: APO-zero, beta 0.1; a fifth of DPO's rate, as in D'Oosterlinck et al. 2024 (2e-7)."""
    return one_stage("apozero", data, beta=0.1, learning_rate=2e-5)


if __name__ == "__main__":
    main(apozero)

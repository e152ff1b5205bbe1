"""DPO-Positive: DPO that holds the likelihood of the chosen completion up. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def dpop(data: DataConfig) -> tuple[Run, ...]:
    """One stage: DPO-positive, beta 0.3, penalty 50 (Pal et al. 2024); DPO's rate."""
    return one_stage("dpop", data, beta=0.3, penalty_weight=50.0, learning_rate=1e-4)


if __name__ == "__main__":
    main(dpop)

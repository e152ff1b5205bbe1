"""R-DPO: DPO with a price for every token, on preference pairs. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def rdpo(data: DataConfig) -> tuple[Run, ...]:
    """One stage: DPO with a price on length, beta 0.1, alpha 0.01 (Park et al. 2024); DPO's rate."""
    return one_stage("rdpo", data, beta=0.1, alpha=0.01, learning_rate=1e-4)


if __name__ == "__main__":
    main(rdpo)

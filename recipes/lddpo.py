"""LD-DPO: DPO in which the tokens that only the longer completion has count less. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def lddpo(data: DataConfig) -> tuple[Run, ...]:
    """One stage: length-desensitised DPO, beta 0.1, alpha 0.5 (Liu et al. 2024); DPO's rate."""
    return one_stage("lddpo", data, beta=0.1, alpha=0.5, learning_rate=1e-4)


if __name__ == "__main__":
    main(lddpo)

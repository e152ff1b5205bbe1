"""SLiC-HF: a hinge on log-probs and imitation, without a reference, on preference pairs. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def slic(data: DataConfig) -> tuple[Run, ...]:
    """One stage: SLiC, gap 1 nat, weight 0.1 (Zhao et al. 2023); DPO's rate."""
    return one_stage("slic", data, delta=1.0, regularisation_weight=0.1, learning_rate=1e-4)


if __name__ == "__main__":
    main(slic)

"""EXO: the reverse KL divergence to the label, on preference pairs. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def exo(data: DataConfig) -> tuple[Run, ...]:
    """One stage: EXO, beta 0.1, epsilon 1e-3; DPO's rate, as in Ji et al. 2024 (1e-6)."""
    return one_stage("exo", data, beta=0.1, epsilon=1e-3, learning_rate=1e-4)


if __name__ == "__main__":
    main(exo)

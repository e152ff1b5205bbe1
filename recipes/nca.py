"""NCA: noise-contrastive alignment on preference pairs. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def nca(data: DataConfig) -> tuple[Run, ...]:
    """One stage: NCA, beta 0.1; DPO's rate, as in Chen et al. 2024 (5e-6 for both, on QLoRA)."""
    return one_stage("nca", data, beta=0.1, learning_rate=1e-4)


if __name__ == "__main__":
    main(nca)

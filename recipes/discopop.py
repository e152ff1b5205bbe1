"""DiscoPOP: a non-convex blend of the logistic and the exponential loss. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def discopop(data: DataConfig) -> tuple[Run, ...]:
    """One stage: DiscoPOP, beta and tau 0.05; half of DPO's rate, as in Lu et al. 2024 (5e-7)."""
    return one_stage("discopop", data, beta=0.05, tau=0.05, learning_rate=5e-5)


if __name__ == "__main__":
    main(discopop)

"""SimPO: mean log-probs beyond a margin, without a reference, on preference pairs. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def simpo(data: DataConfig) -> tuple[Run, ...]:
    """One stage: SimPO, beta 2, margin 0.5 nats a token; DPO's rate, as in Meng et al. 2024 (1e-6)."""
    return one_stage("simpo", data, beta=2.0, gamma_beta_ratio=0.5, learning_rate=1e-4)


if __name__ == "__main__":
    main(simpo)

"""CPO: a contrast of log-probs and imitation, without a reference, on preference pairs. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def cpo(data: DataConfig) -> tuple[Run, ...]:
    """One stage: CPO, beta 0.1, alpha 1; the 1e-4 of the code of Xu et al. 2024, who train LoRA as well."""
    return one_stage("cpo", data, beta=0.1, alpha=1.0, learning_rate=1e-4)


if __name__ == "__main__":
    main(cpo)

"""KTO: single completions, each judged desirable or not. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage
from dpo.train import Loop


def kto(data: DataConfig) -> tuple[Run, ...]:
    """One stage: KTO, beta 0.1 (Ethayarajh et al. 2024); its reference point wants at least 4 judgements at once."""
    return one_stage("kto", data, beta=0.1, learning_rate=2e-4, loop=Loop(per_device_train_batch_size=8))


if __name__ == "__main__":
    main(kto)

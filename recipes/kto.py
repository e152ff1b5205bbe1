"""KTO: single completions, each judged desirable or not. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import ObjectiveConfig, Run
from dpo.train import Loop, Optimiser


def kto(data: DataConfig) -> tuple[Run, ...]:
    """One stage: KTO, beta 0.1 (Ethayarajh et al. 2024); its reference point wants at least 4 judgements at once."""
    return (
        Run(
            name="kto",
            data=data,
            objective=ObjectiveConfig.model_validate({"name": "kto", "beta": 0.1}),
            optimiser=Optimiser(learning_rate=2e-4),
            loop=Loop(per_device_train_batch_size=8),
        ),
    )


if __name__ == "__main__":
    main(kto)

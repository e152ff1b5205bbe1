"""A reward model, then SFT on the best of several samples. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import ObjectiveConfig, Run, learned_reward, reward_stage
from dpo.sources import RolloutConfig
from dpo.train import Optimiser


def rejection_sampling(data: DataConfig) -> tuple[Run, ...]:
    """Two stages: reward, then SFT on the best of eight samples of each prompt (Touvron et al. 2023, section 3.2.3).

    With a reward of your own, sft.rollout.rewards=[package.module:function], no reward model is trained.
    """
    return (
        reward_stage(data),
        Run(
            name="sft",
            data=data,
            objective=ObjectiveConfig.model_validate("sft"),
            optimiser=Optimiser(learning_rate=1e-4, lr_scheduler_type="linear"),
            rollout=RolloutConfig(rewards=(learned_reward(),), prompts_per_rollout=32, completions_per_prompt=8),
        ),
    )


if __name__ == "__main__":
    main(rejection_sampling)

"""A reward model, then GRPO through it. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import ObjectiveConfig, Run, learned_reward, reward_stage
from dpo.sources import RolloutConfig
from dpo.train import Loop, Optimiser


def grpo(data: DataConfig) -> tuple[Run, ...]:
    """Two stages: reward, then GRPO: of four completions of a prompt, each against their mean (Shao et al. 2024).

    With a reward of your own, grpo.rollout.rewards=[package.module:function], no reward model is trained.
    """
    return (
        reward_stage(data),
        Run(
            name="grpo",
            data=data,
            objective=ObjectiveConfig.model_validate({"name": "grpo"}),
            optimiser=Optimiser(learning_rate=1e-4, lr_scheduler_type="linear"),
            loop=Loop(per_device_train_batch_size=8, gradient_accumulation_steps=2),
            rollout=RolloutConfig(rewards=(learned_reward(),), prompts_per_rollout=16, completions_per_prompt=4),
        ),
    )


if __name__ == "__main__":
    main(grpo)

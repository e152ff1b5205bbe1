"""A reward model, then RLOO through it. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import ObjectiveConfig, Run, learned_reward, reward_stage
from dpo.sources import RolloutConfig
from dpo.train import Loop, Optimiser


def rloo(data: DataConfig) -> tuple[Run, ...]:
    """Two stages: reward, then RLOO: four completions a prompt, each against the others (Ahmadian et al. 2024).

    With a reward of your own, rloo.rollout.rewards=[package.module:function], no reward model is trained.
    """
    return (
        reward_stage(data),
        Run(
            name="rloo",
            data=data,
            objective=ObjectiveConfig.model_validate({"name": "rloo", "kl_coefficient": 0.05}),
            optimiser=Optimiser(learning_rate=1e-4, lr_scheduler_type="linear"),
            loop=Loop(per_device_train_batch_size=8, gradient_accumulation_steps=2),
            rollout=RolloutConfig(rewards=(learned_reward(),), prompts_per_rollout=16, completions_per_prompt=4),
        ),
    )


if __name__ == "__main__":
    main(rloo)

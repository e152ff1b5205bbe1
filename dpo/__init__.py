"""dpo-lab: one preference dataset, any objective, one base model on one GPU, and an honest comparison."""

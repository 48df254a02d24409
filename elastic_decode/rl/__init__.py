"""Budget-constrained rollouts and the GRPO trainer over them."""

"""Does it help, and when: AsyPPO, PPO and GRPO on small tasks, many runs at once on the one-page engine."""

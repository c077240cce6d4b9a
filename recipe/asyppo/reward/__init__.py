"""The rule-based reward for answers in mathematics."""

"""From rollouts of a model to accuracies, comparisons and plots."""

"""From rollouts of a model to accuracies and comparisons."""

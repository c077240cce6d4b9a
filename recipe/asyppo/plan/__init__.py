"""Memory and cost of a run before it is started: ``python -m recipe.asyppo.plan``; needs neither torch nor a GPU."""

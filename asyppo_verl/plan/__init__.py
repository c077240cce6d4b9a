"""Memory and cost of a run before it is started: ``python -m asyppo_verl.plan``; needs neither torch nor a GPU."""

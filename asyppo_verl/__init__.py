"""AsyPPO for verl: PPO whose critic is a few mini-critics, each trained on a disjoint share of every prompt's responses.

The algorithm is in :mod:`asyppo_verl.asyppo`; verl finds the rest through the entry point :mod:`asyppo_verl.plugin`.
"""

__version__ = "0.1.0"

"""Train AsyPPO with verl: ``python -m recipe.asyppo.main_asyppo critic.model.path=... [any verl override]``.

The same run as ``python -m verl.trainer.main_ppo algorithm.adv_estimator=asyppo`` with the paper's ``loss_agg_mode``, every
option of AsyPPO in the configuration, and without relying on verl's plugin discovery.
"""

import hydra
from omegaconf import DictConfig


@hydra.main(config_path="config", config_name="asyppo_trainer", version_base=None)
def main(config: DictConfig) -> None:
    """Activate the plugin in this process, then hand over to verl's own main function."""
    import asyppo_verl.plugin

    asyppo_verl.plugin.activate()
    from verl.trainer.main_ppo import main as verl_main

    verl_main.__wrapped__(config)


if __name__ == "__main__":
    main()

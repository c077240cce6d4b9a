"""The ``verl.plugins`` entry point: importing this module makes ``algorithm.adv_estimator=asyppo`` known to verl.

verl hides the exceptions of its plugins, so a failure is printed here, and stops an AsyPPO run at once.
"""

import sys


def activate() -> None:
    """Install the hooks in this process, once.

    Raises:
        SystemExit: if that fails and the command line asks for AsyPPO; any other process goes on without the plugin.
    """
    try:
        from asyppo_verl import hooks

        hooks.activate()
    except Exception as error:
        message = (
            f"asyppo_verl: the verl plugin could not be loaded ({type(error).__name__}: {error}); "
            "python -m asyppo_verl.doctor says more"
        )
        if any("adv_estimator=asyppo" in argument for argument in sys.argv):
            raise SystemExit(message) from error
        print(message, file=sys.stderr)
        raise


activate()

"""What stock verl needs to train on a CPU, and nothing of AsyPPO: a module for ``VERL_USE_EXTERNAL_MODULES``.

The platform, because verl has none for a CPU, and value models that honour ``attn_implementation``, because verl's ask for
flash-attn. Used with ``VERL_USE_EXTERNAL_PLUGINS=none``.
"""

import wrapt

from asyppo_verl import value_model
from asyppo_verl.cpu import platform

platform.activate()
wrapt.register_post_import_hook(value_model.install, "verl.utils.model")

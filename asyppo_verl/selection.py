"""The selection that ``asyppo.selection`` names, and what it asks for by the names of its parameters.

======================================================  ================================================================
``sigma_N``, ``value_N``, ``values_MN``                 disagreement, mean and single values of the critics
``advantages_N``, ``returns_N``                         of verl's GAE, before any mask
``explained_var``                                       the metric ``asyppo/explained_var``: how well values tell returns
``is_response_N``                                       bool, True on response tokens
``offsets``                                             (B + 1,), row i is ``[offsets[i], offsets[i + 1])``
``adv_mask_fraction``, ``entropy_filter_fraction``      the settings of these names
any other ``<field>_N``                                 a field that the batch has on response positions: ``entropy_N``,
                                                        ``old_log_probs_N``, ``rollout_log_probs_N``, ``rm_scores_N``, ...
======================================================  ================================================================

Rows stand in the order of their keys, whatever the balancing. A rule that masks the tokens of which the policy is surest::

    # my_rules.py, beside where the run is started; on the command line: +asyppo.selection=my_rules.surest
    def surest(entropy_N, is_response_N, adv_mask_fraction):
        keep_N = keep_advantage(entropy_N, is_response_N, fraction=adv_mask_fraction)
        return keep_N, torch.ones_like(keep_N)

:func:`once_explained` is one that comes with the package.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from asyppo_verl.asyppo import select_tokens

Selection = Callable[..., tuple[Tensor, Tensor]]
"""Returns (tokens whose advantage is used, tokens whose entropy earns the bonus): bool, (N,)."""


def load(name: str) -> Selection:
    """Import the function.

    Raises:
        ValueError: if there is no such module or function in it.
    """
    module, _, function = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"asyppo.selection={name} cannot be loaded ({error}); name a function as package.module.function, importable "
            "where the run is started (PYTHONPATH)"
        ) from error


def select(
    selection: Selection, given: Mapping[str, Any], read: Callable[[list[str]], Mapping[str, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Call the selection with what it asks for.

    Args:
        selection: the function.
        given: what is at hand, by parameter name, ``is_response_N`` among it.
        read: fetches fields of the batch on response positions.

    Raises:
        ValueError: if it asks for something unknown, or returns anything but two bool vectors (N,).
    """
    parameters = inspect.signature(selection).parameters
    asked = [name for name, p in parameters.items() if name in given or p.default is p.empty]
    if unknown := [name for name in asked if name not in given and not name.endswith("_N")]:
        raise ValueError(
            f"asyppo.selection asks for {unknown[0]}; a parameter is <field>_N or one of {', '.join(given)}"
        )
    fields = [name.removesuffix("_N") for name in asked if name not in given]
    fetched = {f"{field}_N": vector_N for field, vector_N in read(fields).items()} if fields else {}
    selected = selection(**{name: given[name] if name in given else fetched[name] for name in asked})
    shape = given["is_response_N"].shape
    if len(selected) != 2 or any(keep_N.dtype != torch.bool or keep_N.shape != shape for keep_N in selected):
        raise ValueError(f"asyppo.selection must return two bool vectors of shape {tuple(shape)}")
    return selected


def once_explained(
    sigma_N: Tensor,
    is_response_N: Tensor,
    explained_var: float,
    adv_mask_fraction: float,
    entropy_filter_fraction: float,
    explained: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """:func:`asyppo_verl.asyppo.select_tokens` in steps whose values explain at least ``explained`` of the variance.

    In other steps every token is used: the critics' disagreement is then the noise of their heads (docs/study.md).
    """
    if explained_var < explained:
        adv_mask_fraction = entropy_filter_fraction = 0.0
    return select_tokens(
        sigma_N, is_response_N, adv_mask_fraction=adv_mask_fraction, entropy_filter_fraction=entropy_filter_fraction
    )

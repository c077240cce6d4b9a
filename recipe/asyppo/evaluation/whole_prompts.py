"""verl's own data set, which refuses problems that verl would cut.

Chosen by ``scripts/evaluate.sh`` through ``data.custom_cls``.
"""

import datasets
from verl.utils.dataset.rl_dataset import RLHFDataset


class WholePrompts(RLHFDataset):
    """With ``data.filter_overlong_prompts``, which leaves out in silence what an evaluation must not."""

    def maybe_filter_out_long_prompts(self, dataframe: datasets.Dataset) -> datasets.Dataset:
        """All problems.

        Raises:
            ValueError: if one is longer than ``data.max_prompt_length`` tokens, of which verl keeps the last.
        """
        kept = super().maybe_filter_out_long_prompts(dataframe)
        if len(kept) < len(dataframe):
            raise ValueError(
                f"data.max_prompt_length={self.max_prompt_length} would cut {len(dataframe) - len(kept)} of "
                f"{len(dataframe)} problems (or their chat template fails, see above); set MAX_PROMPT to more"
            )
        return kept

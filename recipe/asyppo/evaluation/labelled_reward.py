"""verl's own reward manager, with the reward of a response labelled by what an evaluation needs to know about it.

Chosen by ``scripts/evaluate.sh`` through ``reward.reward_manager.source=importlib``.
"""

import hashlib
import json
import logging

from verl import DataProto
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager

logger = logging.getLogger(__name__)

LABEL = "label"


def problem_id(data_source: str, prompt: list[dict], ground_truth: object) -> str:
    """Name a problem in the same way in every evaluation, whatever the model, its chat template and the file's order."""
    text = json.dumps([data_source, prompt, ground_truth], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class LabelledRewardManager(NaiveRewardManager):
    """verl's scores; all that the reward function returns goes into one label, next to benchmark and problem.

    A label is a string, since verl spends a bootstrap in pure Python on every numeric entry of its validation. A response
    whose reward function fails is wrong, and labelled; verl would drop it.
    """

    async def run_single(self, data: DataProto) -> dict:
        failure = {}
        try:
            scored = await super().run_single(data)
        except Exception as error:
            logger.exception("the reward function failed")
            failure = {"failure": f"{type(error).__name__}: {error}"}
            scored = {"reward_score": 0.0, "reward_extra_info": {"acc": 0, "pred": ""}}
        item = data[-1]
        response = item.batch["responses"]
        response = response[: int(item.batch["attention_mask"][-len(response) :].sum())]
        fields = item.non_tensor_batch
        label = {
            "benchmark": str(fields["data_source"]),
            "problem": problem_id(
                fields["data_source"], list(fields["raw_prompt"]), fields["reward_model"]["ground_truth"]
            ),
            "tokens": len(response),
            # A response that the model ends itself ends with a special token, which is among its tokens.
            "truncated": not (len(response) and int(response[-1]) in self.tokenizer.all_special_ids),
            "reward": scored["reward_extra_info"],
            **failure,
        }
        return {**scored, "reward_extra_info": {LABEL: json.dumps(label, default=_plain)}}


def _plain(value: object) -> object:
    return value.tolist() if hasattr(value, "tolist") else str(value)

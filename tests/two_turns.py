"""An agent loop of two turns, for the tests: two tokens of the model, three of the environment, two of the model.

Sessions 0 and 1 of a prompt are one output with a hole; sessions 2 and 3 give each turn as an output of its own, as loops
do that rewrite their context.
"""

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput

TURN_TOKENS, OBSERVATION = 2, "no;"


class TwoTurns(AgentLoopBase):
    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput | list[AgentLoopOutput]:
        messages = list(kwargs["raw_prompt"])
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        observation = self.tokenizer.encode(OBSERVATION)
        first = await self._turn(kwargs["session_id"], prompt, sampling_params)
        context = [*prompt, *first.token_ids, *observation]
        second = await self._turn(kwargs["session_id"], context, sampling_params)
        if kwargs["session_id"] >= 2:
            return [_output(prompt, [first]), _output(context, [second])]
        return _output(prompt, [first, second], observation)

    async def _turn(self, session: int, prompt: list[int], sampling_params: dict[str, Any]) -> Any:
        limits = {"max_tokens": TURN_TOKENS, "ignore_eos": True}
        return await self.server_manager.generate(
            request_id=f"{id(self)}-{session}", prompt_ids=prompt, sampling_params={**sampling_params, **limits}
        )


def _output(prompt: list[int], turns: list[Any], observation: list[int] | None = None) -> AgentLoopOutput:
    responses, mask, log_probs = [], [], []
    for turn in turns:
        if responses:
            responses, mask, log_probs = (
                responses + observation,
                mask + [0] * len(observation),
                log_probs + [0.0] * len(observation),
            )
        responses, mask, log_probs = (
            responses + turn.token_ids,
            mask + [1] * len(turn.token_ids),
            log_probs + (turn.log_probs or []),
        )
    return AgentLoopOutput(
        prompt_ids=prompt,
        response_ids=responses,
        response_mask=mask,
        response_logprobs=log_probs,
        num_turns=2 * len(turns),
        metrics={},
        extra_fields={
            "min_global_steps": min(turn.extra_fields["min_global_steps"] for turn in turns),
            "max_global_steps": max(turn.extra_fields["max_global_steps"] for turn in turns),
            "turn_scores": [],
            "tool_rewards": [],
        },
    )

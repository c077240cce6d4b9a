"""The quiz on verl (:mod:`recipe.asyppo.toy.make_quiz`): an agent loop that asks, marks and gives the reward."""

from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput


class QuizLoop(AgentLoopBase):
    """One answer of one token a turn; between two turns the environment marks the answer and asks the next question.

    What the environment writes is an observation (``response_mask`` 0): not trained, and passed over by GAE. The last word is
    the model's, since verl stores the reward, the share of right answers, at the end.
    """

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        messages = list(kwargs["raw_prompt"])
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        _, *questions = messages[0]["content"].split()[:-1]
        truths = kwargs["reward_model"]["ground_truth"].split()
        settings = {**sampling_params, "max_tokens": 1, "ignore_eos": True}
        response: list[int] = []
        mask: list[int] = []
        log_probs: list[float] = []
        marks: list[bool] = []
        outputs: list[Any] = []
        session = uuid4().hex  # all turns go to the server that holds their prefix
        for turn, truth in enumerate(truths):
            output = await self.server_manager.generate(
                request_id=session, prompt_ids=prompt + response, sampling_params=settings
            )
            if len(output.token_ids) != 1:
                raise RuntimeError(f"turn {turn} gave {len(output.token_ids)} tokens instead of 1: it was aborted")
            outputs.append(output)
            marks.append(self.tokenizer.decode(output.token_ids) == truth)
            observation = []
            if turn < len(questions):
                observation = self.tokenizer.encode(f"{'right' if marks[-1] else 'wrong'} {questions[turn]}")
            response += [*output.token_ids, *observation]
            mask += [1] + [0] * len(observation)
            log_probs += [*(output.log_probs or []), *(0.0 for _ in observation)]
        # Weights may change between two turns: the first and the last version count.
        versions = {"min_global_steps": outputs[0].extra_fields["min_global_steps"]}
        return AgentLoopOutput(
            prompt_ids=prompt,
            response_ids=response,
            response_mask=mask,
            response_logprobs=log_probs if output.log_probs else None,
            reward_score=sum(marks) / len(marks),
            num_turns=2 * len(truths),
            metrics={},
            extra_fields={**output.extra_fields, **versions, "turn_scores": [], "tool_rewards": []},
        )

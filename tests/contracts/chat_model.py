"""What every ChatModel does."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest

from services.inference.domain import ChatOptions, Delta, Finish, Role, Turn
from services.runtime.errors import InvalidArgumentError

if TYPE_CHECKING:
    from services.inference.domain import ChatModel

QUESTION = [Turn(Role.USER, "What is the capital of France? Answer in one sentence.")]


async def answer(model: ChatModel, turns: list[Turn], **options: Any) -> list[Delta]:
    return [delta async for delta in model.chat(turns, ChatOptions(**options))]


class ChatModelContract:
    """Subclasses give a fixture `model`."""

    async def test_the_answer_comes_in_pieces_and_ends_with_its_counts(self, model: ChatModel) -> None:
        deltas = await answer(model, QUESTION, temperature=0)
        assert "Paris" in "".join(delta.text for delta in deltas)
        assert len(deltas) > 3
        assert [delta.finish for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish is Finish.STOP
        assert deltas[-1].input_tokens > 0
        assert deltas[-1].output_tokens > 0

    async def test_the_longest_answer_is_a_bound(self, model: ChatModel) -> None:
        deltas = await answer(model, QUESTION, max_tokens=3)
        assert deltas[-1].finish is Finish.LENGTH
        assert deltas[-1].output_tokens <= 3

    async def test_equal_seeds_give_equal_answers(self, model: ChatModel) -> None:
        first = await answer(model, QUESTION, temperature=1, seed=7, max_tokens=12)
        again = await answer(model, QUESTION, temperature=1, seed=7, max_tokens=12)
        assert [delta.text for delta in first] == [delta.text for delta in again]

    async def test_leaving_early_stops_the_generation(self, model: ChatModel) -> None:
        tale: Any = model.chat([Turn(Role.USER, "Tell a very long story.")], ChatOptions(max_tokens=4096))
        async with aclosing(tale) as deltas:
            async for delta in deltas:
                if delta.text:
                    break
        # The next answer must not wait for four thousand tokens: this test's timeout is the proof.
        assert (await answer(model, QUESTION, max_tokens=2))[-1].finish is not None

    async def test_a_conversation_over_the_context_is_refused(self, model: ChatModel) -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            await answer(model, [Turn(Role.USER, "word " * 10_000)])
        assert caught.value.reason == "CONTEXT_EXCEEDED"

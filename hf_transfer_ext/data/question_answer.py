"""Tokenize a question and its answer, and find where the answer starts: the same for training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class EncodedAnswer:
    """Token ids of prompt and answer. `input_ids[answer_start:]` are learned, scored or forgotten."""

    input_ids: list[int]
    answer_start: int

    @property
    def answer_length(self) -> int:
        return len(self.input_ids) - self.answer_start

    @property
    def labels(self) -> list[int]:
        """The token ids with those of the prompt ignored (-100), as long as `input_ids`."""
        from hf_transfer_ext.tensors import IGNORE_INDEX  # imports torch, which a merge's record does without

        return [IGNORE_INDEX] * self.answer_start + self.input_ids[self.answer_start :]


@dataclass(frozen=True)
class QuestionAnswerFormat:
    """How to format a question as a prompt.

    Args:
        template: "plain" uses `prompt` below; "chat" uses the tokenizer's chat template; "auto" is "chat" if the
            tokenizer has one.
        prompt: The plain prompt; `{question}` stands for the question. It should not end with a space: most
            tokenizers attach a space to the word that follows it.
        separator: Text between the plain prompt and the answer.
        system: System message of the chat template; None for no system message.
        end_of_sequence: Whether the end (the end-of-sequence token, or what the chat template writes after an answer)
            belongs to the answer, so that the model also learns, or is tested on, where to stop.
        max_length: Maximum sequence length in tokens; the end of a longer answer is cut off. None for no limit.
        examples: Questions with answers that come before each question: earlier turns of a chat, or text before the
            plain prompt, a blank line after each.
        chat_template_kwargs: Additional variables for the chat template. With `{"enable_thinking": False}`, the
            template of a reasoning model (such as Qwen3) writes an empty thought before the answer, so that answers
            without a thought are scored at the position where the model would generate them.
    """

    template: str = "auto"
    prompt: str = "Question: {question}\nAnswer:"
    separator: str = " "
    system: str | None = None
    end_of_sequence: bool = True
    max_length: int | None = None
    examples: tuple[tuple[str, str], ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.template not in ("auto", "chat", "plain"):
            raise ValueError(f"`template` must be auto, chat or plain, got {self.template!r}.")
        if "{question}" not in self.prompt:
            raise ValueError(f"`prompt` needs the placeholder {{question}}, got {self.prompt!r}.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2 tokens, got {self.max_length}.")

    def uses_chat(self, tokenizer: Any) -> bool:
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if self.template == "chat" and not has_template:
            raise ValueError(
                f"`template='chat'` needs a tokenizer with a chat template, but {tokenizer.name_or_path!r} has none. "
                "Use template='plain', or set `tokenizer.chat_template`."
            )
        return has_template if self.template == "auto" else self.template == "chat"

    def prompt_text(self, tokenizer: Any, question: str) -> str:
        """The text before the answer, which the model is prompted with."""
        if self.uses_chat(tokenizer):
            return tokenizer.apply_chat_template(
                self._conversation(_asking(question)), tokenize=False, add_generation_prompt=True,
                **self.chat_template_kwargs,
            )  # fmt: skip
        before = [self.prompt.replace("{question}", asked) + self.separator + said for asked, said in self.examples]
        return "\n\n".join([*before, self.prompt.replace("{question}", question)])

    def prompt_ids(self, tokenizer: Any, question: str) -> list[int]:
        """Token ids of the prompt alone, for generation."""
        text = self.prompt_text(tokenizer, question)
        # A chat template writes the special tokens itself.
        ids = tokenizer(text, add_special_tokens=not self.uses_chat(tokenizer))["input_ids"]
        return _without_end(ids, tokenizer)

    def encode(self, tokenizer: Any, question: str, answer: str) -> EncodedAnswer:
        """Tokenize prompt and answer as one text.

        A token that spans the end of the prompt and the start of the answer counts as part of the answer.

        Raises:
            ValueError: The answer is empty, or `max_length` leaves none of its tokens.
        """
        if self.uses_chat(tokenizer):
            return self.encode_chat(tokenizer, _asking(question), answer)
        prompt = self.prompt_text(tokenizer, question)
        return self._encoded(tokenizer, prompt, answer, self.separator, _end_of_sequence(tokenizer), special=True)

    def encode_completion(self, tokenizer: Any, prompt: str, completion: str) -> EncodedAnswer:
        """Like `encode`, for a prompt and its completion without any template or separator."""
        self.refuse_examples("a prompt with its completion")
        return self._encoded(tokenizer, prompt, completion, "", _end_of_sequence(tokenizer), special=True)

    def encode_chat(self, tokenizer: Any, messages: list[dict[str, str]], answer: str) -> EncodedAnswer:
        """Like `encode`, for an assistant's answer in a conversation, with the tokenizer's chat template.

        `system` and `examples` are prepended; a system message of the conversation itself goes before `system`.
        """
        if getattr(tokenizer, "chat_template", None) is None or self.template == "plain":
            raise ValueError(
                f"Chat messages need a chat template: the tokenizer {tokenizer.name_or_path!r} has "
                f"{'none' if getattr(tokenizer, 'chat_template', None) is None else 'one'}, and `template` is "
                f"{self.template!r}. Set `tokenizer.chat_template` and template='auto', or pass question and answer."
            )
        messages = self._conversation(messages)
        prompt = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
        )
        return self._encoded(tokenizer, prompt, answer, "", self._chat_end(tokenizer, messages), special=False)

    def _encoded(
        self, tokenizer: Any, prompt: str, answer: str, separator: str, end: list[int], *, special: bool
    ) -> EncodedAnswer:
        if not answer.strip():
            raise ValueError(f"The answer to {prompt!r} is empty, so there is no token to learn or to score.")
        ids, start = _ids_and_boundary(tokenizer, prompt, prompt + separator + answer, add_special_tokens=special)
        if start >= len(ids):
            raise ValueError(
                f"The answer {answer!r} does not add any token in this tokenizer, so it cannot be scored."
            )
        if self.end_of_sequence:
            ids = ids + end
        if self.max_length is not None:
            ids = ids[: self.max_length]
        if start >= len(ids):
            raise ValueError(
                f"No token of the answer {answer!r} is left: its prompt has {start} tokens and `max_length` is "
                f"{self.max_length}. Raise `max_length` or shorten the question."
            )
        return EncodedAnswer(ids, start)

    def refuse_examples(self, what: str) -> None:
        """Refuse rows that have no question which `examples` could come before."""
        if self.examples:
            raise ValueError(
                f"`examples` of the template come before a question, and {what} has none. Leave them out, or give "
                "rows with a question and an answer."
            )

    def _conversation(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """The messages after the system message and the examples."""
        system, rest = ([messages[0]], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
        if not system and self.system is not None:
            system = [{"role": "system", "content": self.system}]
        before = [
            {"role": role, "content": text}
            for example in self.examples
            for role, text in zip(("user", "assistant"), example, strict=True)
        ]
        return [*system, *before, *rest]

    def _chat_end(self, tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
        """What the chat template writes after an answer, or the end-of-sequence token if it writes nothing.

        The template is rendered with a placeholder for the answer: a short answer may occur in the end marker itself.
        """
        rendered = tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": _STAND_IN}], tokenize=False, **self.chat_template_kwargs
        )
        _, found, suffix = rendered.rpartition(_STAND_IN)
        if found and suffix.strip():
            return list(tokenizer(suffix.rstrip("\n"), add_special_tokens=False)["input_ids"])
        return _end_of_sequence(tokenizer)


def _asking(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


#: Placeholder for the answer while a chat template is rendered; it must not occur in any template.
_STAND_IN = "(the answer 7f3a91)"


def _end_of_sequence(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def encode_text(tokenizer: Any, text: str, *, max_length: int | None = None) -> EncodedAnswer:
    """Plain text, scored from its second token (the first one has no context to be predicted from).

    If the tokenizer adds a special token at the start, every token of the text itself is scored.
    """
    ids = _without_end(tokenizer(text)["input_ids"], tokenizer)[:max_length]
    if len(ids) < 2:
        raise ValueError(f"The text {text[:80]!r} has {len(ids)} token(s); at least 2 are needed to predict one.")
    return EncodedAnswer(ids, 1)


def _ids_and_boundary(tokenizer: Any, prompt: str, text: str, *, add_special_tokens: bool) -> tuple[list[int], int]:
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        # Special tokens have the empty span (0, 0); a trailing one is removed first.
        ids, offsets = _without_end(ids, tokenizer), offsets[: len(_without_end(ids, tokenizer))]
        start = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
        return ids, start
    # A tokenizer without offsets: tokenize prompt and answer separately, which loses a rare merge at the boundary.
    head = _without_end(tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"], tokenizer)
    return head + list(tokenizer(text[len(prompt) :], add_special_tokens=False)["input_ids"]), len(head)


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Remove one trailing end-of-sequence token: some tokenizers always add it, but a prompt must not have it."""
    if len(ids) > 1 and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id:
        return list(ids[:-1])
    return list(ids)

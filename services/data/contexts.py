"""Prompts of student and teacher as token ids: the teacher's prompt also contains the demonstration."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sdft.services.base.errors import UserError
from sdft.services.base.files import existing_file
from sdft.services.config.data import DataConfig
from sdft.services.config.templates import BUILT_IN_TEMPLATES
from sdft.services.data.chat_template import REPLY, ReplyEnd, left_out, reply_end, reply_text
from sdft.services.data.demonstrations import Record
from sdft.services.data.first_token import begins_twice, missing_first
from sdft.services.data.generation import known_ends
from sdft.services.data.messages import Message, said
from sdft.services.data.rendering import ChatTemplate
from sdft.services.data.template_variables import check_variables
from sdft.services.data.templates import UserTemplate
from sdft.services.data.thoughts import opened_by, without_thoughts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Wording of the SDFT paper (arXiv 2601.19897). The paper has no wording for a context; it comes before the example.
_CONTEXT = "This is background for the question:\n{context}\n\n"
_PAPER = (
    "{question}\n\n{context}This is an example for a response to the question:\n{demonstration}\n\n"
    "Now answer with a response of your own, including the thinking process."
)
# As in self-distilled policy optimisation: feedback on an attempt takes the place of the example.
_FEEDBACK = (
    "{question}\n\nThis is feedback on an earlier response to the question:\n{feedback}\n\n"
    "Now answer with a response of your own that needs no such feedback."
)


class PromptBuilder:
    """Turns records into prompts with a tokenizer's chat template and a teacher template.

    `template` is "paper" (the last user message holds the example), "turn" (the demonstration is an earlier assistant
    turn), "context" (the background alone), "feedback" (feedback on an attempt), "none" (the teacher's prompt is the
    student's), or the path of a Jinja template, relative to the folder `base`, whose output is the teacher's last
    user message. `system` is prepended to records without a system message. `now` is the time for chat templates that
    write the date; None: the current time. `student_variables` and `teacher_variables` are given to the chat template
    for the prompts of each. `fallback` is the built-in template for records that lack the column that `template` shows;
    None: they have no teacher's prompt. UserError if the tokenizer has no usable chat template, or it does not use such
    a variable.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: str,
        base: Path,
        system: str | None,
        now: datetime | None = None,
        student_variables: Mapping[str, Any] = MappingProxyType({}),
        teacher_variables: Mapping[str, Any] = MappingProxyType({}),
        fallback: str | None = None,
    ) -> None:
        self._chat = ChatTemplate(tokenizer, now or datetime.now())
        check_variables(tokenizer, [*student_variables, *teacher_variables])
        self._tokenizer = tokenizer
        self._student_variables, self._teacher_variables = student_variables, teacher_variables
        self._known_ends = known_ends(tokenizer)
        self._template = template
        self._fallback = fallback
        self._system = system
        self._user_template = None if template in BUILT_IN_TEMPLATES else _user_template(template, base)
        self._shown = self._user_template.shown if self._user_template else BUILT_IN_TEMPLATES[template]
        self._end: ReplyEnd | None = None

    def student(self, item: Record) -> list[int]:
        """Token ids of the prompt alone."""
        return self._encode(self._with_system(item), item, self._student_variables)

    def teacher(self, item: Record) -> list[int] | None:
        """Token ids of the prompt with the column that the template shows.

        A record that lacks that column is shown with the fallback template; None if it lacks that one's column, too.
        """
        template, shown = self._template, self._shown
        if self._fallback is not None and shown is not None and getattr(item, shown) is None:
            template, shown = self._fallback, BUILT_IN_TEMPLATES[self._fallback]
        if shown is not None and getattr(item, shown) is None:
            return None
        messages = self._with_system(item)
        at = max(i for i, message in enumerate(messages) if message["role"] == "user")
        earlier, question = messages[:at], messages[at]["content"]
        later = messages[at + 1 :]  # the assistant's calls of tools and their results
        if template == "none":
            turns = [messages[at]]
        elif template == "context":
            turns = [_user(f"{_CONTEXT.format(context=item.context)}{question}")]
        elif template == "feedback":
            turns = [_user(_FEEDBACK.format(question=question, feedback=item.feedback))]
        elif template == "turn":
            first = question if item.context is None else f"{_CONTEXT.format(context=item.context)}{question}"
            turns = [_user(first), *later, *_replies(item.demonstration), _user(question)]
        elif self._user_template is None:
            turns = [_user(_paper(question, self._as_example(item) or "", item.context))]
        else:
            text = self._user_template.render(
                item.where,
                prompt=question,
                demonstration=self._as_example(item),
                context=item.context,
                feedback=item.feedback,
                messages=messages,
            )
            if text.strip() == question.strip():
                raise UserError(
                    f"{self._template}: renders only the prompt for {item.where}, so teacher and student would see the "
                    f"same; put {{{{ {self._shown} }}}} into the template"
                )
            turns = [_user(text)]
        one = template == "turn" and not isinstance(item.demonstration, tuple)
        whole = at + 1 + len(later) if one else None
        return self._encode([*earlier, *turns, *later], item, self._teacher_variables, whole)

    def conversation(self, item: Record) -> tuple[list[int], list[bool] | None]:
        """Token ids of the demonstration behind the student's prompt, and which the assistant writes (None: all).

        Each reply of several turns is as `demonstration` says, and between two replies is what `between` says.
        """
        if not isinstance(item.demonstration, tuple):
            return self.demonstration(item), None
        so_far, ids, mask = list(item.messages), list[int](), list[bool]()
        for own, of_turn in groupby(item.demonstration, key=lambda message: message["role"] == "assistant"):
            messages, here = list(of_turn), replace(item, messages=tuple(so_far))
            made = (
                self.demonstration(replace(here, demonstration=messages[0]))
                if own
                else self.between(replace(item, messages=tuple(so_far[:-1])), messages)
            )
            ids += made
            mask += [own] * len(made)
            so_far += messages
        return ids, mask

    def demonstration(self, item: Record) -> list[int]:
        """Token ids of the demonstration as a reply to the student's prompt, with the token that ends it.

        They are what the chat template renders behind the prompt. UserError if it does not show the demonstration
        there, or if the demonstration has the token that ends a reply.
        """
        prompt, text, end = self._as_reply(item)
        # Tokenized behind the prompt, because some tokenizers treat the beginning of a text in another way.
        before, ids = self._ids(prompt), self._ids(f"{prompt}{text}")
        reply = ids[len(before) :] if ids[: len(before)] == before else self._ids(text)
        ends = (end, self.end(item).token_id)
        found = next((i for i in reply if i in ends), None)
        if found is not None:
            token = self._tokenizer.convert_ids_to_tokens(found)
            raise UserError(f"{item.where}: the demonstration has {token}, which ends a reply; remove it")
        return [*reply, end]

    def _as_reply(self, item: Record) -> tuple[str, str, int]:
        """Return the student's prompt, the demonstration as a reply to it, and the token that ends the reply."""
        assert not isinstance(item.demonstration, tuple)
        messages, reply = self._with_system(item), _reply(item.demonstration)
        answered = [*messages, reply]
        prompt, whole = self._render(messages, item, opened=True), self._render(answered, item, opened=False)
        if "tool_calls" in reply:
            self._chat.check_shown(whole, answered, item, self._student_variables)
        try:
            return prompt, *reply_text(self._tokenizer, reply, prompt, whole, self.end(item), self._known_ends)
        except ValueError as problem:
            raise UserError(f"{item.where}: {self._chat.name} {problem}") from None

    def length(self, item: Record) -> int:
        """Return about how many tokens the demonstration has as a reply, or its longest one, without a check."""
        end = self.end(item).text
        replies = [m for m in _replies(item.demonstration) if m["role"] == "assistant"]
        return max(len(self._ids(f"{said(reply)}{end}")) + 1 for reply in replies)

    def _as_example(self, item: Record) -> str | None:
        """Return the demonstration as text in a user's message; None if there is none.

        A message with calls is what the chat template writes for it, without an empty reasoning that it adds. Several
        turns are written with their roles.
        """
        if isinstance(item.demonstration, tuple):
            return "\n\n".join(f"{m['role']}: {without_thoughts(said(m)).strip()}" for m in item.demonstration)
        if not isinstance(item.demonstration, dict):
            return item.demonstration
        _, text, _ = self._as_reply(item)
        content = item.demonstration["content"]
        return (text if without_thoughts(content) != content else without_thoughts(text)).strip()

    def between(self, item: Record, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the token ids between the end of a reply and the next one, with these messages there.

        They are what the chat template renders behind the token that ends a reply. The reply itself is not rendered:
        its tokens stay as they were sampled. UserError if the template does not show the messages.
        """
        end = self.end(item)
        members = ("role", "content", "name", "tool_call_id")
        answers: Any = [{key: m[key] for key in members if key in m} for m in messages]
        before = [*self._with_system(item), Message(role="assistant", content=REPLY)]
        behind = self._render([*before, *answers], item, opened=True).rpartition(REPLY)[2]
        token = self._tokenizer.convert_ids_to_tokens(end.token_id)
        ended, _, text = behind.partition(f"{end.text}{token}")
        if ended.strip() or left_out(text, answers) is not None:
            raise UserError(f"{item.where}: {self._chat.name} does not show what answers a reply unchanged")
        return self._ids(text)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of a reply, without the token that ends it and other special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def reply(self, item: Record, ids: Sequence[int]) -> str:
        """Return the text of a reply with its marks, of reasoning and of calls, also where they are special tokens.

        The token that ends it is left out. A mark that the chat template has opened in the prompt is there.
        """
        ends = self.stop_ids(item)
        kept = ids[:-1] if ids and ids[-1] in ends else ids
        return opened_by(self._tokenizer, self.student(item)) + str(
            self._tokenizer.decode(list(kept), skip_special_tokens=False)
        )

    def end(self, item: Record) -> ReplyEnd:
        """Return what ends a reply. It is found once, with the first `item`'s prompt, and is the same for all items."""
        if self._end is None:
            self._end = reply_end(
                self._tokenizer,
                lambda messages, opened: self._render(messages, item, opened),
                self._with_system(item),
                self._known_ends,
            )
        return self._end

    def stop_ids(self, item: Record) -> tuple[int, ...]:
        """Return every token that ends a reply: that of `end` first, then those that the model's files name."""
        return tuple(dict.fromkeys((self.end(item).token_id, *self._known_ends)))

    def lacks_first(self, item: Record) -> str | None:
        """Return a warning if the tokenizer begins a text with a token that the chat template leaves out."""
        missing = missing_first(self._tokenizer, self.student(item))
        if missing is None:
            return None
        return (
            f"the tokenizer in {self._tokenizer.name_or_path} begins a text with {missing}, and its chat template does "
            f"not write it, so the prompts of this run do not begin with it either; write it at the beginning of the "
            f"template if the model was trained with it"
        )

    def _with_system(self, item: Record) -> list[Message]:
        messages = list(item.messages)
        if self._system is not None and all(m["role"] != "system" for m in messages):
            messages.insert(0, Message(role="system", content=self._system))
        return messages

    def _encode(
        self, messages: list[Message], item: Record, variables: Mapping[str, Any], whole: int | None = None
    ) -> list[int]:
        """Render and tokenize `messages`. UserError if the template drops one. whole: index of the demonstration."""
        text = self._chat.text(messages, item, True, variables)
        self._chat.check_shown(text, messages, item, variables, whole)
        ids = self._ids(text)
        if begins_twice(self._tokenizer, ids):
            raise UserError(
                f"{item.where}: {self._chat.name} begins this prompt with {self._tokenizer.bos_token} twice; "
                f"remove one from the template or the messages"
            )
        return ids

    def _render(self, messages: list[Message], item: Record, opened: bool) -> str:
        return self._chat.text(messages, item, opened, self._student_variables)

    def _ids(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"]]


def shown_to_teacher(data: DataConfig, base: Path) -> str | None:
    """Return the column that rows need for data.template; None: only the prompt.

    With data.fallback_template it is the columns of both, as "demonstration|feedback": a row needs one of them.
    UserError if the file of a template is unusable.
    """
    template = data.template
    shown = BUILT_IN_TEMPLATES[template] if template in BUILT_IN_TEMPLATES else _user_template(template, base).shown
    if data.fallback_template is None or shown is None:
        return shown
    other = BUILT_IN_TEMPLATES[data.fallback_template]
    if other == shown:
        raise UserError(f"data.fallback_template {other} has no effect: {template} shows {shown}, too; remove it")
    return f"{shown}|{other}"


def _user_template(template: str, base: Path) -> UserTemplate:
    return UserTemplate(existing_file("data.template", template, base))


def _user(content: str) -> Message:
    return Message(role="user", content=content)


def _replies(demonstration: str | Message | tuple[Message, ...] | None) -> list[Message]:
    """Return the demonstration as messages: a reply, or several turns."""
    return list(demonstration) if isinstance(demonstration, tuple) else [_reply(demonstration)]


def _reply(demonstration: str | Message | None) -> Message:
    if isinstance(demonstration, dict):
        return demonstration
    return Message(role="assistant", content=demonstration or "")


def _paper(question: str, demonstration: str, context: str | None) -> str:
    heading = "" if context is None else _CONTEXT.format(context=context)
    return _PAPER.format(question=question, context=heading, demonstration=demonstration)

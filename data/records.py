"""The one record type: a conversation about one media item, whatever corpus it comes from."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

Role = Literal["user", "assistant"]


class Message(TypedDict):
    """One turn of a conversation, text only."""

    role: Role
    content: str


@dataclass(frozen=True)
class Record:
    """A conversation about one media item, which stands before the text of the first user message.

    Args:
        id: names the record in logs and errors; unique within a corpus.
        messages: user and assistant in turn, the user first. A record that ends with the user is a query: it can be
            answered but not trained on.
        audio: file whose sound is heard; the same as `video` where the sound is the video's own track.
        video: file whose frames are seen.
        duration: seconds, where the corpus states it; None: only decoding will tell.

    Raises:
        ValueError: the messages do not alternate or one of them is empty, there is no media, or the duration is not
            a positive number.
    """

    id: str
    messages: tuple[Message, ...]
    audio: Path | None = None
    video: Path | None = None
    duration: float | None = None

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError(f"record {self.id!r} has no messages; it needs at least one of the user")
        for i, message in enumerate(self.messages):
            expected = ("user", "assistant")[i % 2]
            if message["role"] != expected:
                raise ValueError(f"record {self.id!r}: message {i} must be of the {expected}, got {message['role']!r}")
            if not message["content"].strip():
                raise ValueError(f"record {self.id!r}: message {i} (of the {expected}) is empty")
        if self.audio is None and self.video is None:
            raise ValueError(f"record {self.id!r} has neither audio nor video; it needs one of them or both")
        if self.duration is not None and not (self.duration > 0 and math.isfinite(self.duration)):
            raise ValueError(f"record {self.id!r}: duration must be positive seconds, got {self.duration}")

    @property
    def is_query(self) -> bool:
        """Whether the last word is the user's, so that there is nothing to train on after it."""
        return self.messages[-1]["role"] == "user"

    @property
    def reference(self) -> str:
        """The last answer, what a generated one is compared with; raises ValueError for a query."""
        if self.is_query:
            raise ValueError(f"record {self.id!r} is a query: its last message is of the user, so it has no reference")
        return self.messages[-1]["content"]

    def query(self) -> Record:
        """Gives the record without its last answer, to generate that answer from."""
        return self if self.is_query else dataclasses.replace(self, messages=self.messages[:-1])


def user(content: str) -> Message:
    """Makes a user message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """Makes an assistant message."""
    return {"role": "assistant", "content": content}

"""The processes that make speech and clips while `align.py` trains."""

from __future__ import annotations

import logging
import os
import random
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch

from audiopress.benchmarks.alignment.clips import DURATIONS, ClipBank, ClipMaker, MadeClip
from audiopress.benchmarks.alignment.speech import SpeechBank, Spoken, Texts, speak_all

log = logging.getLogger(__name__)

# All guesses.
START = (1000, 50)  # training begins when there are so many utterances and clips, or all that there will be
CLIP_TASKS = 0.5  # of the processes' tasks
TASK_TEXTS, TASK_CLIPS = 64, 4  # of one task: about two seconds
RESTARTS = 3  # of all processes, after one has died: the voices are C libraries


class Makers:
    """Processes that make speech and clips for as long as there is room for them.

    Args:
        speech: to be filled.
        clips: to be filled.
        texts: to be spoken.
        maker: of clips.
        most: clips to make.
        workers: processes.
        seed: of this start: another one makes other speech and clips.
    """

    def __init__(
        self, speech: SpeechBank, clips: ClipBank, texts: Texts, maker: ClipMaker, most: int, workers: int, seed: int
    ) -> None:
        self.speech, self.clips, self.texts, self.maker = speech, clips, texts, maker
        self.most, self.workers, self.rng = most, workers, random.Random(seed)
        self.made, self.restarts = 0, RESTARTS
        self.tasks: set[Future[Any]] = set()
        # What arrives is copied beside the training: in its own stream a copy would wait for the steps before it.
        self.stream = torch.cuda.Stream() if speech.device.type == "cuda" else None
        self._open()

    def _open(self) -> None:
        context = get_context("forkserver")  # spawned, each would import everything anew, one after the other
        context.set_forkserver_preload([__name__])
        self.pool = ProcessPoolExecutor(self.workers, context, _start, (self.maker,))
        self.tasks.clear()
        self._ask()

    def _ask(self) -> None:
        """Keeps two tasks per process waiting."""
        while len(self.tasks) < 2 * self.workers:
            room = self.speech.has_room((len(self.tasks) + 1) * TASK_TEXTS)
            wanted = self.made < self.most
            if wanted and (not room or self.rng.random() < CLIP_TASKS):
                (seconds,) = self.rng.choices(DURATIONS, [1 / d for d in DURATIONS])
                self.tasks.add(self.pool.submit(_make, range(self.made, self.made + TASK_CLIPS), seconds))
                self.made += TASK_CLIPS
            elif room:
                texts = [self.texts.draw(self.rng) for _ in range(TASK_TEXTS)]
                self.tasks.add(self.pool.submit(speak_all, texts, self.rng.getrandbits(32)))
            else:
                return

    def collect(self, timeout: float = 0.0) -> None:
        """Takes what is finished.

        An error in a process is raised here. Where one has died, all are started anew, `RESTARTS` times at most.
        """
        done, self.tasks = wait(self.tasks, timeout, FIRST_COMPLETED)
        try:
            with torch.cuda.stream(self.stream):
                for task in done:
                    self._take(task.result())
            if self.stream is not None and done:
                torch.cuda.current_stream().wait_stream(self.stream)
            self._ask()
        except BrokenProcessPool:
            if not self.restarts:
                raise
            self.restarts -= 1
            log.warning("a process that makes speech and clips has died: all are started anew")
            self.pool.shutdown(wait=False, cancel_futures=True)
            self._open()

    def _take(self, found: Any) -> None:
        if isinstance(found, Spoken):
            self.speech.add(found)
        else:
            for clip in found:
                self.clips.add(clip)

    def wait(self) -> None:
        """Waits until there is enough to begin with."""
        utterances, clips = START
        while self.tasks and (len(self.speech.utterances["synthetic"]) < utterances or self.clips.count < clips):
            self.collect(timeout=1.0)

    def close(self) -> None:
        """Ends the processes."""
        self.pool.shutdown(cancel_futures=True)


_maker: list[ClipMaker] = []  # of a process


def _start(maker: ClipMaker) -> None:
    os.nice(10)  # the training goes first
    torch.set_num_threads(1)
    _maker[:] = [maker]


def _make(indices: range, seconds: int) -> list[MadeClip]:
    return [_maker[0](index, seconds) for index in indices]

"""Measuring: how long a call takes, and what the number depends on besides the settings."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def timed(run: Callable[[], Any], repeats: int, device: torch.device) -> dict[str, Any]:
    """Gives the milliseconds of a call: median, 20th and 80th percentile of `repeats` after one to warm up."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    samples = []
    for _ in range(repeats + 1):
        finish()
        started = time.perf_counter()
        run()
        finish()
        samples.append(1e3 * (time.perf_counter() - started))
    kept = sorted(samples[1:])
    return {
        "median": statistics.median(kept),
        "p20": kept[round(0.2 * (len(kept) - 1))],
        "p80": kept[round(0.8 * (len(kept) - 1))],
        "n": len(kept),
        "first": samples[0],
    }


def peak_memory(device: torch.device) -> int:
    """Gives the most bytes held so far: on a GPU those of tensors, on a CPU those of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment(device: torch.device) -> dict[str, Any]:
    """Gives time, commit, versions and machine."""
    root = Path(__file__).parents[1]

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "schema": 1,
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        **{name: _version(name) for name in ("torch", "transformers", "peft", "triton")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

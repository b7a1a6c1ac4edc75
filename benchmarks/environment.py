"""Measuring: how long a call takes, and what the number depends on besides the settings."""

from __future__ import annotations

import importlib
import math
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

ENERGY_MS = 2000  # over which joules are counted: the driver adds to its counter every 0.1 s or so (a guess)


def timed(run: Callable[[], Any], repeats: int, device: torch.device, warm_ups: int = 1) -> dict[str, Any]:
    """Gives the milliseconds of a call: median, 20th and 80th percentile of `repeats`, and all that it took to warm up.

    Args:
        run: what is timed.
        repeats: how often.
        device: that is waited for.
        warm_ups: calls before.
    """
    samples = []
    for _ in range(warm_ups + repeats):
        finish(device)
        started = time.perf_counter()
        run()
        finish(device)
        samples.append(1e3 * (time.perf_counter() - started))
    kept = sorted(samples[warm_ups:])
    return {
        "median": statistics.median(kept),
        "p20": kept[round(0.2 * (len(kept) - 1))],
        "p80": kept[round(0.8 * (len(kept) - 1))],
        "n": len(kept),
        "warm_up": sum(samples[:warm_ups]),
    }


def finish(device: torch.device) -> None:
    """Waits for a GPU to end what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(run: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """Gives the bytes held before a call on a GPU, and the most in it; nothing of a CPU."""
    if device.type != "cuda":
        return {}
    finish(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    run()
    finish(device)
    return {
        "held_before": held,
        "peak_allocated": torch.cuda.max_memory_allocated(device),
        "peak_reserved": torch.cuda.max_memory_reserved(device),
    }


def energy(run: Callable[[], Any], milliseconds: float, device: torch.device) -> float | None:
    """Gives the joules of a call that takes so long: the mean of as many as fill `ENERGY_MS`; None as `joules`."""
    finish(device)
    before = joules(device)
    if before is None:
        return None
    times = math.ceil(ENERGY_MS / milliseconds)
    for _ in range(times):
        run()
    finish(device)
    after = joules(device)
    return None if after is None else (after - before) / times


def joules(device: torch.device) -> float | None:
    """Gives what a GPU has used since its driver was loaded; None where pynvml or the driver does not tell."""
    if device.type != "cuda":
        return None
    try:
        pynvml = importlib.import_module("pynvml")  # required nowhere: it is of use on few machines
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except pynvml.NVMLError:
        return None


def peak_memory(device: torch.device) -> int:
    """Gives the most bytes held so far: on a GPU those of tensors, on a CPU those of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Gives time, commit, versions and machine.

    Args:
        device: that is measured on.
        commit: of the code, where it is not in a checkout.
    """
    root = Path(__file__).parents[1]

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "schema": 1,
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or git("rev-parse", "HEAD") or None,
        "dirty": commit is None and bool(git("status", "--porcelain", "--untracked-files=no")),
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        **{name: _version(name) for name in ("torch", "transformers", "peft", "triton")},
    }


def device_name(device: torch.device) -> str:
    """Gives the name of a GPU, or of the kind of processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0] if lines else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

"""The time testbed, which `events.py` runs: clips of `timeline.py` with their questions, the answers, the scores."""

"""The report of speed: rows of the benchmarks of speed as tables and pictures; `report.py` writes it."""

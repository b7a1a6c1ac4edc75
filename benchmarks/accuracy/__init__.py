"""The report of accuracy: rows of both testbeds as tables and pictures; `report.py` writes it."""

"""The page of the accuracy rows that `report.py --html` writes."""

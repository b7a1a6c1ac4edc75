"""What `align.py` trains omni-small on, how, and how well it then hears and sees."""

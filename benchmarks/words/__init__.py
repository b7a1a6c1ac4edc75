"""The word testbed, which `speech.py` runs: prompts as clips, the cells, the training, and how texts are compared."""

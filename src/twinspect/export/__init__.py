"""A trained model as one file for another runtime: its graph, int8, and the proof that both say the same."""

"""A trained model as one file for another runtime, and the proof that both say the same."""

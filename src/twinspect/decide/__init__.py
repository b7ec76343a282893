"""From the scores of good images to answers: thresholds with a stated false-alarm rate, and drift since then."""

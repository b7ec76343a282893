"""Training: samples in, a trained and calibrated model out."""

"""Prediction: images in, results in the images' own geometry out."""

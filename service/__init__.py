"""Online scoring: a bundle and features in, calibrated probabilities out."""

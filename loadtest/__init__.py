"""Load on a running service, generated and reported."""

"""Offline side: impression logs to a bundle."""

"""Adapters that turn a public data set into logs and the tables beside them, one file each."""

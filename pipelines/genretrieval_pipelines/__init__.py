"""Offline work: from Parquet logs to a bundle, and the figures on the way."""

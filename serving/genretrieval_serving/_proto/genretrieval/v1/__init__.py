"""Generated from retrieval.proto by serving/generate.py."""

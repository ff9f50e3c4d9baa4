"""Items to semantic IDs."""

"""Label-budget studies."""

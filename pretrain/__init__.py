"""Batches -> a trained encoder -> an export. Knows no downstream task."""

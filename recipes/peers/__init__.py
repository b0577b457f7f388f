"""Whom generation is measured beside: one file per peer, each asked for the same rollout of the same weights."""

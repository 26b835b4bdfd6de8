"""Activation patching: which places of a run are replaced from another, and what that recovers."""

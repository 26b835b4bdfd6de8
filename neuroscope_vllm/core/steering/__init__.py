"""Steering: what may be asked for, what it comes to at each layer, and its arithmetic."""

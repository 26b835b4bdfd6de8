"""The feature card: what is known of one feature, from its SAE's files. `python -m` serves them."""

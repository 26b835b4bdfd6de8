"""Models, SAEs, calibrations and labels on the Hugging Face hub: `pull` and `push`."""

"""What every engine that serves does with the rows of a step, whatever runs the model."""

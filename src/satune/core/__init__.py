"""Pure tensor functions and small state machines: no input, no output, no model library."""

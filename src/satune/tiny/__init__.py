"""The tiny base models: how they are made, taught and kept."""

"""A look into trained encoders."""

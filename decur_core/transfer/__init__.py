"""What encoders are worth on labelled images."""

"""Miniature worlds with known factors, and their files in the published layouts."""

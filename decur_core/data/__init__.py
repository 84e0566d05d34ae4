"""Readers of the published layouts, the store, and the miniature world."""

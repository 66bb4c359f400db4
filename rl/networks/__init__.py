"""Policies and critics, and their arithmetic in numpy where they are small."""

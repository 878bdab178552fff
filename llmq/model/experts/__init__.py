"""Experts of a mixture as separate linear layers."""

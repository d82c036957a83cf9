"""Recipes: every key, its default, its meaning, the rules between keys, and how a file becomes one.

Imports no torch.
"""

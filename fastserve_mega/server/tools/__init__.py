"""Calls of tools in a model's text: one module for each way of writing them."""

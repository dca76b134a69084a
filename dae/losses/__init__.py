"""Losses, the expressions that combine them, and the contract that each must keep."""

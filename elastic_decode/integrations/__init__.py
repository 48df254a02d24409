"""Budgets inside other people's stacks. Each adapter imports its library only when it is used."""

"""Budgets measured: sweeps over policies and budgets, records that survive a kill, tables and plots."""

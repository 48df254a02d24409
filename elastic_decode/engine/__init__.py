"""The decode engine: pages, rows, schedule, loop."""

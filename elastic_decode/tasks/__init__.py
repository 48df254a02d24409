"""Tasks: dataset, prompt and grader in one place each."""

"""The machinery of the programs: nothing in here is needed to understand a training step."""

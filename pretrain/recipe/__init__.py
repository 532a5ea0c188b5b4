"""What the stages of the recipe share; see README.md for the stages themselves."""

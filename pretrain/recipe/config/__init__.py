"""What a user edits: the JSON files of a recipe, read and checked."""
